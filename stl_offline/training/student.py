"""Stage 2, ``stl-offline train-student``: a student beside whose class labels stand token labels.

STL (arXiv 2401.03844), section 3.2: CE(class logits, y) + w · mean over tokens of CE(token logits, token label).
The labels come from a label set (dumped once), from the labeler in every step (the released code's way), or nowhere.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.config import StudentConfig
from stl_offline.device import autocast
from stl_offline.errors import InputError, JoinError
from stl_offline.labelers import NamedLabeler, find_labeler
from stl_offline.labels.cache import TokenCache, build_token_cache
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.loader import Batch
from stl_offline.losses import soft_cross_entropy, token_cross_entropy
from stl_offline.mixing import draw_mix, mix_class_targets, mix_images, mix_token_targets
from stl_offline.targets import TokenTargets
from stl_offline.training.engine import StepRandom, Trainer
from stl_offline.training.online import online_targets
from stl_offline.training.setup import Stage, prepare


def train_student(config: StudentConfig) -> dict[str, Any]:
    """Train a student; gives back the summary that the run's folder holds.

    Raises:
        StlError: bad input, labels that do not belong to the pictures, or a loss that is not finite.
    """
    stage = prepare(config, "student")
    source = _open_labels(config, stage)
    folder = stage.run_folder(**source.identity())
    complete = folder.summary() if config.resume else None
    if complete is not None:
        return complete
    loader = stage.train_loader(**source.loader_arguments())
    state = folder.open(resume=config.resume, write=stage.world.is_first)

    def loss(model: nn.Module, batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        return student_step(stage, source, model, batch, random)

    trainer = Trainer(
        config,
        folder,
        stage.model,
        loader,
        loss,
        source.plan,
        stage.validation(),
        stage.description,
        stage.device,
        stage.world,
    )
    return trainer.fit(state)


def student_step(
    stage: Stage, source: "LabelSource", model: nn.Module, batch: Batch, random: StepRandom
) -> dict[str, Tensor]:
    """From a batch to stage 2's loss: token targets, jitter, mix of pixels and both labels, forward, losses."""
    tokens = source.tokens(batch, random)
    images = stage.jitter(batch.images, random)
    mix = draw_mix(len(images), *images.shape[2:], stage.mix, random.numpy) if stage.mix.enabled else None
    if mix is not None:
        images = mix_images(images, mix)
        if tokens is not None:
            tokens = mix_token_targets(*tokens, source.grid, mix)
    targets = mix_class_targets(batch.class_ids, len(stage.train.class_names), stage.config.smoothing, mix)
    with autocast(stage.device, stage.amp):
        class_logits, token_logits = model(images)
    class_loss = soft_cross_entropy(class_logits, targets)
    if tokens is None:
        return {"loss": class_loss, "class_loss": class_loss}
    ids, weights = tokens
    token_loss = token_cross_entropy(token_logits, ids, weights, stage.config.smoothing)
    return {
        "loss": class_loss + stage.config.token_weight * token_loss,
        "class_loss": class_loss,
        "token_loss": token_loss,
        "labelled": weights.sum(dim=-1).mean(),
    }


class LabelSource:
    """No labels at all: the baseline. What the other sources change, they override."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        side = stage.config.img_size
        self.grid: tuple[int, int] = stage.model.grid_size(side, side)

    def identity(self) -> dict[str, Any]:
        """What the labels are, by content: a run with other labels is another run."""
        return {"kind": "none"}

    def loader_arguments(self) -> dict[str, Any]:
        return {}

    def plan(self, epoch: int) -> dict[str, Any]:
        return {"views": self.stage.random_views(epoch)}

    def tokens(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor] | None:
        """Token targets (ids, weights), each (B, N, m), or None."""
        return None


class OnlineLabels(LabelSource):
    """The labeler sees the student's crop in every step."""

    def __init__(self, stage: Stage, named: NamedLabeler, config: StudentConfig) -> None:
        super().__init__(stage)
        self.named, self.config = named, config
        self.labeler = named.model.to(stage.device).eval()
        side = config.img_size
        labeler_grid = tuple(self.labeler.grid_size(side, side))
        if labeler_grid != self.grid:
            raise InputError(
                f"at {side} pixels the labeler {named.architecture} gives {labeler_grid} tokens and the student "
                f"{stage.description.model} {self.grid}; online labels need equal grids (dumped ones do not)"
            )
        _check_classes(named.class_names, stage, f"the labeler {config.labeler}")

    def identity(self) -> dict[str, Any]:
        return {"kind": "online", "weights_sha256": self.named.weights_sha256}

    def tokens(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        config = self.config
        images = _renormalise(batch.images, self.stage, self.labeler)
        return online_targets(self.labeler, images, config.token_target, config.columns, config.residual, random.torch)


class DumpedLabels(LabelSource):
    """Labels from a label set, joined by key and read from the token cache by the loader."""

    def __init__(self, stage: Stage, label_set: LabelSet, config: StudentConfig) -> None:
        super().__init__(stage)
        self.fingerprint = label_set.fingerprint
        has_crops = label_set.spec.views["kind"] == "random"
        self.replay = has_crops if config.views == "auto" else config.views == "replay"
        if self.replay and not has_crops:
            raise InputError(
                f"{config.labels} holds whole pictures, no crops to replay; use --views random, or dump with --views V"
            )
        if has_crops and not self.replay:
            raise InputError(
                f"{config.labels} holds labels of {label_set.spec.views_per_image} crops, not of whole pictures; "
                "use --views replay, or dump without --views"
            )
        beton = stage.train
        self.cache: TokenCache = build_token_cache(
            label_set,
            beton.keys,
            beton.content_hashes,
            beton.class_names,
            missing=config.missing,
            allow_changed=config.allow_changed,
        )
        self.targets = TokenTargets(
            kind=config.token_target,
            grid=self.grid,
            m=config.columns if config.token_target == "soft" else 1,
            sampling_ratio=config.sampling_ratio,
            residual=config.residual,
            min_confidence=config.min_confidence,
        )

    def identity(self) -> dict[str, Any]:
        return {"kind": "dumped", "fingerprint": self.fingerprint}

    def loader_arguments(self) -> dict[str, Any]:
        return {"tokens": self.targets, "cache": self.cache}

    def plan(self, epoch: int) -> dict[str, Any]:
        if not self.replay:
            return super().plan(epoch)
        view = epoch % self.cache.views.shape[1]
        views = np.array(self.cache.views[:, view])
        # A sample without labels has no stored crop: it gets a fresh one.
        unlabelled = np.flatnonzero(np.asarray(self.cache.labelled) == 0)
        if len(unlabelled):
            views[unlabelled] = self.stage.random_views(epoch)[unlabelled]
        return {"views": views, "map_index": np.full(len(views), view, dtype=np.int64)}

    def tokens(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        return batch.token_ids, batch.token_weights


def _open_labels(config: StudentConfig, stage: Stage) -> LabelSource:
    if config.labels == "none":
        return LabelSource(stage)
    if config.labels == "online":
        named = find_labeler(config.labeler, config.labeler_checkpoint, config.img_size)
        return OnlineLabels(stage, named, config)
    return DumpedLabels(stage, open_label_set(config.labels), config)


def _check_classes(class_names: tuple[str, ...], stage: Stage, whose: str) -> None:
    if tuple(class_names) != tuple(stage.train.class_names):
        raise JoinError(
            f"the classes of {whose} ({len(class_names)}: {', '.join(class_names[:3])}, …) are not those of the "
            f"pictures ({len(stage.train.class_names)}: {', '.join(stage.train.class_names[:3])}, …)"
        )


def _renormalise(images: Tensor, stage: Stage, labeler: Any) -> Tensor:
    """From the student's mean and std to the labeler's."""
    if tuple(labeler.mean) == tuple(stage.mean) and tuple(labeler.std) == tuple(stage.std):
        return images
    ours, theirs = (
        [torch.tensor(values, device=images.device)[:, None, None] for values in pair]
        for pair in ((stage.mean, stage.std), (labeler.mean, labeler.std))
    )
    return (images * ours[1] + ours[0] - theirs[0]) / theirs[1]
