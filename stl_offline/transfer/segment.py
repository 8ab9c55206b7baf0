"""``stl-offline transfer segment``: fine-tune a backbone on masks.

B: images of a step in this process; H, W: crop; K: classes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from stl_offline.augment import Augmentation
from stl_offline.config_transfer import SegmentConfig
from stl_offline.device import autocast, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, join_world, leaving_world
from stl_offline.errors import InputError
from stl_offline.palette import class_pixels
from stl_offline.training.engine import run_training
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.setup import TrainingRun, run_settings, seed_weights
from stl_offline.training.step_timer import DryRun
from stl_offline.training.steps import Share, StepRandom
from stl_offline.training.watch import summary_writer
from stl_offline.transfer.backbone import make_backbone
from stl_offline.transfer.crops import DenseCrops
from stl_offline.transfer.dry_run import DenseTimer, measure_dense
from stl_offline.transfer.pair_loader import PairBatch, PairLoader
from stl_offline.transfer.pairs import NO_CLASS, PairSet, check_ignore_id, class_list, open_pairs
from stl_offline.transfer.segment_scores import SegmentValidation, check_sizes
from stl_offline.transfer.segmenter import Segmenter, SegmenterDescription

STAGE = "segmenter"


def train_segmenter(config: SegmentConfig) -> dict[str, Any]:
    """Fine-tune a backbone on masks; gives back the summary that the run's folder holds. Under torchrun, as one process
    of it.

    Raises:
        StlError: bad input, or a loss that is not finite.
    """
    with leaving_world():
        run = _prepare(config)
        return run_training(
            run, _folder(run), SegmentObjective(run), lambda epoch: {}, lambda: (_loader(run), _scorer(run))
        )


def dry_run_segmenter(config: SegmentConfig) -> DryRun:
    """Check settings, data and backbone as `train_segmenter` does, and take a few steps; nothing is written.

    Raises:
        StlError: what the run itself would raise before its first step.
    """
    with leaving_world():
        run = _prepare(config)
        timer = DenseTimer(run, _loader(run), SegmentObjective, config.crop_height * config.crop_width)
        return measure_dense(timer, _folder(run), run.model.backbone, len(run.val or ()))


@dataclass(kw_only=True)
class SegmentRun(TrainingRun):
    """What training a segmenter works with."""

    config: SegmentConfig
    model: Segmenter
    train: PairSet
    val: PairSet | None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The backbone's layers, whose rates fall towards the input, and the head with its own."""
        config = self.config
        backbone = (
            [] if config.freeze else self.model.backbone.parameter_groups(config.weight_decay, config.layer_decay)
        )
        head = param_groups_weight_decay(self.model.head, config.weight_decay)
        return [*backbone, *(group | {"lr_scale": config.head_lr_scale} for group in head)]

    def identity(self) -> dict[str, Any]:
        """What the data and the backbone's weights are, by content."""
        sets = {"train": self.train, "val": self.val}
        found = {
            name: None if each is None else {"fingerprint": each.fingerprint, "samples": len(each)}
            for name, each in sets.items()
        }
        return found | {
            "class_names": list(self.train.class_names),
            "processes": self.world.size,
            "backbone": self.model.backbone.identity(),
        }


@dataclass(frozen=True)
class SegmentInputs:
    """images: (B, 3, H, W); masks: int64 (B, H, W), `NO_CLASS` where there is no class."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, count: int) -> Iterator["SegmentInputs"]:
        """The same in ``count`` nearly equal parts; fewer where there are fewer images."""
        cut = zip(torch.tensor_split(self.images, count), torch.tensor_split(self.masks, count), strict=True)
        return (SegmentInputs(*part) for part in cut if len(part[0]))

    def first(self, count: int) -> "SegmentInputs":
        """The first images alone, in memory of their own."""
        return SegmentInputs(self.images[:count].clone(), self.masks[:count].clone())

    @property
    def places(self) -> int:
        """Pixels of an image."""
        return self.masks[0].numel()

    def totals(self) -> Tensor:
        """(2,) float64: images, and pixels that have a class."""
        labelled = (self.masks != NO_CLASS).sum(dtype=torch.float64)
        return torch.stack([torch.full_like(labelled, len(self.images)), labelled])


class SegmentObjective:
    """Cross-entropy of each pixel that has a class, mean over all of a step."""

    def __init__(self, run: SegmentRun) -> None:
        self.run = run
        backbone, config = run.model.backbone, run.config
        self.augmentation = Augmentation(
            auto=None,
            jitter=config.color_jitter,
            erase=None,
            mean=backbone.mean,
            std=backbone.std,
            size=config.crop,
            seed=config.seed,
        )

    def inputs(self, batch: PairBatch, random: StepRandom) -> SegmentInputs:
        images = self.augmentation(batch.images, None, batch.epoch, batch.sample_ids.numpy())
        return SegmentInputs(images, batch.masks)

    def losses(self, model: nn.Module, inputs: SegmentInputs, share: Share) -> dict[str, Tensor]:
        with autocast(self.run.device, self.run.amp):
            logits = model(inputs.images)
        labelled = (inputs.masks != NO_CLASS).sum().clamp(min=1)
        loss = F.cross_entropy(logits.float(), inputs.masks, ignore_index=NO_CLASS, reduction="sum") / labelled
        hits = (logits.detach().argmax(dim=1) == inputs.masks).sum() / labelled
        return {"loss": loss * share.mass, "accuracy": hits * share.mass}

    @torch.no_grad()
    def image_rows(self, model: nn.Module, inputs: SegmentInputs) -> dict[str, Tensor]:
        """Images side by side, their masks and what is predicted, in the classes' colours: uint8 (3, H, B·W) each."""
        backbone = self.run.model.backbone
        mean, std = (
            torch.tensor(each, device=inputs.images.device)[:, None, None] for each in (backbone.mean, backbone.std)
        )
        was_training = model.training
        predicted = model.eval()(inputs.images).argmax(dim=1)
        model.train(was_training)
        rows = {"images": ((inputs.images * std + mean).clamp(0, 1) * 255).round().byte()}
        for name, ids in (("masks", inputs.masks), ("predictions", predicted)):
            rows[name] = torch.from_numpy(class_pixels(ids.cpu().numpy())).permute(0, 3, 1, 2)
        return {name: torch.cat(list(row), dim=2).cpu() for name, row in rows.items()}


def _prepare(config: SegmentConfig) -> SegmentRun:
    """Check the settings, build the model, find and check the pairs."""
    if config.tensorboard:
        summary_writer()
    device = pick_device(config.device)
    amp = pick_amp(config.amp, device)
    RunFolder(config.out, STAGE, run_settings(config, amp), {}).look(config.resume)
    classes = class_list(config.classes)
    check_ignore_id(config.ignore_id, classes)
    seed_weights(config.seed)
    backbone = make_backbone(config, config.crop)
    if any(side % backbone.multiple for side in config.crop):
        raise InputError(
            f"the sides of a crop must be multiples of {backbone.multiple} for {backbone.spec.model}; "
            f"got `crop_height`={config.crop_height} and `crop_width`={config.crop_width}"
        )
    model = Segmenter(backbone, config.head_width, len(classes), config.head_dropout)
    world = join_world(device)
    train = open_pairs(config.data, classes, config.ignore_id, config.split)
    val = open_pairs(config.val, classes, config.ignore_id, config.val_split) if config.val else None
    if val is not None and not config.sliding_window:
        check_sizes(backbone, val)
    spec = backbone.spec
    description = SegmenterDescription(
        spec.model, spec.indices, classes, config.crop, config.head_width, config.ignore_id
    )
    return SegmentRun(
        config=config,
        device=device,
        amp=amp,
        world=world,
        model=model,
        description=description,
        train=train,
        val=val,
    )


def _folder(run: SegmentRun) -> RunFolder:
    return RunFolder(run.config.out, STAGE, run_settings(run.config, run.amp), run.identity())


def _loader(run: SegmentRun) -> PairLoader:
    config, backbone = run.config, run.model.backbone
    return PairLoader(
        run.train,
        DenseCrops(config.crop, (config.scale_min, config.scale_max), config.flip),
        config.batch_size * config.accumulate,
        mean=backbone.mean,
        std=backbone.std,
        workers=pick_workers(config.workers),
        seed=config.seed,
        device=run.device,
        world=run.world,
    )


def _scorer(run: SegmentRun) -> SegmentValidation | None:
    if run.val is None:
        return None
    window = run.config.crop if run.config.sliding_window else None
    return make_validation(run.model, run.val, run.device, run.amp, pick_workers(run.config.workers), run.world, window)


def make_validation(
    model: Segmenter,
    pairs: PairSet,
    device: torch.device,
    amp: torch.dtype | None,
    workers: int,
    world: World,
    window: tuple[int, int] | None,
) -> SegmentValidation:
    """What scores a segmenter on pairs; ``window``: (H, W) of a sliding window, or None."""
    backbone = model.backbone
    return SegmentValidation(
        pairs, backbone.mean, backbone.std, backbone.multiple, device, amp, workers, world, window=window
    )
