"""Where a student's token labels come from: label sets (dumped once), the labeler in every step, or nowhere.

n: samples; B: batch; N: tokens; m: targets per token.
"""

import abc
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stl_offline.augment import visible_share, warp_images
from stl_offline.config import StudentConfig
from stl_offline.device import autocast, upload
from stl_offline.errors import InputError, JoinError
from stl_offline.labels.cache import CacheMaker
from stl_offline.labels.cache_file import TokenCache
from stl_offline.labels.families import group_families
from stl_offline.labels.keys import rename_keys
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.spec import check_use
from stl_offline.labels.views_ahead import ViewsAhead
from stl_offline.loader import DECODER, Batch, TokenLabels
from stl_offline.models import TokenLabeler, check_labeler, create_labeler
from stl_offline.targets import TokenTargets
from stl_offline.training.class_labels import check_class_answers, class_answers, class_share
from stl_offline.training.label_choice import LabelChoice, choose_between
from stl_offline.training.online import online_targets
from stl_offline.training.setup import Stage
from stl_offline.training.steps import StepRandom

# Below this labelled mass a run is told so; of how many images it is measured.
_LITTLE_MASS, _LOOKED_AT = 0.9, 256
# Of how many images with draws, and up to how many classes, it is measured what soft targets drop; more is a fault.
_LOOKED_AT_CLASSES, _MOST_CLASSES, _ALMOST_ALL = 64, 128, 0.99
# How often a run may read its labels before it is told how to divide them.
_MOST_READS = 2
_LOGGER = logging.getLogger(__name__)


class LabelSource:
    """No token labels: the baseline, and the base class of the other sources."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        side = stage.config.img_size
        self.grid: tuple[int, int] = stage.model.grid_size(side, side)

    def identity(self) -> dict[str, Any]:
        """What the labels are, by content: a run with other labels is another run."""
        return {"kind": "none"}

    def loader_labels(self) -> TokenLabels | None:
        """What the loader makes token targets from; None where it makes none."""
        return None

    def close(self) -> None:
        """End what runs in the background."""

    def plan(self, epoch: int) -> dict[str, Any]:
        return self.stage.random_plan(epoch)

    def tokens(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor] | None:
        """Token targets (ids, weights), each (B, N, m), or None."""
        return None

    def class_answers(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Class distributions (B, K), and the part (B, 1) of the class target that each takes; None: no part."""
        return None


class TokenSource(LabelSource, abc.ABC):
    """Base of all sources with token labels: weights labels of erased cells by their visible part, if so set."""

    def __init__(self, stage: Stage, config: StudentConfig) -> None:
        super().__init__(stage)
        self.config = config

    @abc.abstractmethod
    def targets(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        """Ids and weights (B, N, m) of images without holes."""

    def tokens(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        ids, weights = self.targets(batch, random)
        if self.config.erased_labels == "drop":
            epochs, samples = batch.epochs.numpy(), batch.sample_ids.numpy()
            kept = self.stage.augmentation.kept_share(epochs, samples, self.grid)
            if kept is not None:
                weights = weights * upload(kept, weights.device)[..., None]
        return ids, weights


class OnlineLabels(TokenSource):
    """The labeler labels the student's crop in every step: after spatial augmentation, before colour augmentation."""

    def __init__(self, stage: Stage, labeler: TokenLabeler, config: StudentConfig) -> None:
        super().__init__(stage, config)
        self.labeler = labeler.to(stage.device)
        side = config.img_size
        labeler_grid = tuple(self.labeler.grid_size(side, side))
        if labeler_grid != self.grid:
            raise InputError(
                f"at {side} pixels the labeler {labeler.name} gives {labeler_grid} tokens and the student "
                f"{stage.description.model} {self.grid}; online labels need equal grids (dumped ones do not)"
            )
        if labeler.class_names is None:
            raise InputError(
                f"the {labeler.num_classes} classes of {labeler.name} have no names: give `labeler_classes`"
            )
        _check_classes(labeler.class_names, stage, f"the labeler {config.labeler}")
        if labeler.interpolation != config.interpolation:
            _LOGGER.warning(
                "the labeler %s was trained on images resized by %s; online it sees this student's, resized by %s",
                *(config.labeler, labeler.interpolation, config.interpolation),
            )

    def identity(self) -> dict[str, Any]:
        return {"kind": "online", "weights_sha256": self.labeler.weights_sha256}

    def targets(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        config = self.config
        parts = []
        # A step of many batches is labelled batch by batch, as it is learned: the labeler needs no more memory for it.
        for start in range(0, len(batch.images), config.batch_size):
            rows = slice(start, start + config.batch_size)
            images = batch.images[rows]
            if batch.warps is not None:
                images = warp_images(images, batch.warps[rows])
            images = _renormalise(images, self.stage, self.labeler)
            with autocast(self.stage.device, self.stage.amp):
                parts.append(
                    online_targets(
                        self.labeler,
                        images,
                        config.token_target,
                        config.soft_classes,
                        config.residual,
                        random.torch,
                        config.min_confidence,
                        batch.class_ids[rows],
                    )
                )
        ids, weights = (torch.cat(each) for each in zip(*parts, strict=True))
        if batch.warps is not None:
            seen = visible_share(batch.warps, self.grid, config.sampling_ratio)
            weights = weights * upload(seen, weights.device)[..., None]
        return ids, weights


class DumpedLabels(TokenSource):
    """Labels from label sets, joined by key and read from token caches by the loader.

    Of a set of whole images a sample reads its one map under a fresh crop; of a set of crops it replays one of them,
    in turn. Token caches hold the views at hand (`stl_offline.labels.views_ahead`). With several sets,
    `stl_offline.training.label_choice` chooses which one a sample reads in an epoch.
    """

    def __init__(self, stage: Stage, label_sets: list[LabelSet], config: StudentConfig) -> None:
        super().__init__(stage, config)
        groups = _as_one(label_sets, config)
        self.fingerprints = [label_set.fingerprint for group in groups for label_set in group]
        if stage.world.is_first:
            warn_of_other_pixels(label_sets, config.interpolation)
        self.replays, self.choice = how_read(label_sets, config)
        if stage.world.is_first:
            replayed = [group[0] for group, replay in zip(groups, self.replays, strict=True) if replay]
            warn_of_other_crops(replayed, config.scale_min, config.flip)
        self.sources = [_join(group, stage, config, len(groups) > 1) for group in groups]
        if stage.world.is_first:
            tell_of_reading(groups, self.sources)
        self.labelled = np.stack([source.labelled for source in self.sources])
        self._tells = stage.world.is_first and config.residual == "ignore" and config.token_norm == "mass"
        self._tells_of_classes = stage.world.is_first and config.token_target == "soft"
        self._chosen: tuple[range, list[TokenCache], np.ndarray, np.ndarray] | None = None
        self.target_settings = TokenTargets(
            kind=config.token_target,
            grid=self.grid,
            m=config.soft_classes if config.token_target == "soft" else 1,
            sampling_ratio=config.sampling_ratio,
            residual=config.residual,
            min_confidence=config.min_confidence,
        )

    def identity(self) -> dict[str, Any]:
        if len(self.fingerprints) == 1:
            return {"kind": "dumped", "fingerprint": self.fingerprints[0]}
        return {"kind": "dumped", "fingerprints": self.fingerprints}

    def loader_labels(self) -> TokenLabels:
        """Those of no view: each epoch's come with its plan."""
        none = [TokenCache.of_no_views(source.spec, source.labelled) for source in self.sources]
        return TokenLabels(self.target_settings, none)

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def plan(self, epoch: int) -> dict[str, Any]:
        plan = super().plan(epoch)
        epochs, samples = self.config.shown_together(epoch), len(self.stage.train)
        views = plan["views"]
        chosen, maps = (np.zeros(len(views), dtype=np.int64) for _ in range(2))
        caches: list[TokenCache] = []
        for each in epochs:
            start = samples * (each - epochs.start)
            rows = slice(start, start + samples)
            chosen[rows] = self._plan_epoch(each, views[rows], maps[rows], caches)
        labels = TokenLabels(self.target_settings, caches)
        if self._tells:
            self._tells = False
            _tell_of_weight(caches)
        if self._tells_of_classes:
            self._tells_of_classes = False
            labelled = np.stack([cache.labelled for cache in caches]) > 0
            which = np.flatnonzero(labelled[chosen[:samples], np.arange(samples)])
            _tell_of_classes(labels, epochs.start, which, views, maps, chosen)
        self._chosen = (epochs, caches, chosen, maps)
        return plan | {"map_index": maps, "cache_index": chosen, "labels": labels}

    def _plan_epoch(self, epoch: int, views: np.ndarray, maps: np.ndarray, caches: list[TokenCache]) -> np.ndarray:
        """Which of ``caches``, to which this epoch's are added, each sample reads: int64 (n,).

        views, maps: (n, 6) and (n,) of the epoch, changed in place where stored crops are replayed. A sample without
        labels has no stored crop: it keeps its fresh one.
        """
        chosen = np.zeros(len(views), dtype=np.int64)
        if self.choice is not None:
            chosen = self.choice(epoch, views, self.labelled)
        places = np.zeros(len(self.sources), dtype=np.int64)
        for number, (source, replayed) in enumerate(zip(self.sources, self.replays, strict=True)):
            cache, place = source.of_epoch(epoch, self.config.epochs)
            same = [at for at, other in enumerate(caches) if other is cache]
            places[number] = same[0] if same else len(caches)
            if not same:
                caches.append(cache)
            if replayed:
                mine = np.flatnonzero((chosen == number) & self.labelled[number])
                maps[mine] = place
                views[mine] = cache.views[mine, place]
        return places[chosen]

    def class_answers(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        share = class_share(self.config.class_target)
        if not share:
            return None
        samples, epochs = batch.sample_ids.numpy(), batch.epochs.numpy()
        if self._chosen is None or epochs[0] not in self._chosen[0]:
            self.plan(int(epochs[0]))
        together, caches, chosen, maps = self._chosen
        crops = samples + len(self.stage.train) * (epochs - together.start)
        dense, labelled = class_answers(caches, samples, chosen[crops], maps[crops])
        parts = share * labelled[:, None].astype(np.float32)
        device = batch.class_ids.device
        return upload(dense, device), upload(parts, device)

    def targets(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        return batch.token_ids, batch.token_weights


def labeler_of(config: StudentConfig) -> TokenLabeler:
    """The labeler of ``labels = "online"``, for images of the student's size. Raises as `create_labeler`."""
    return create_labeler(
        config.labeler,
        labeler_checkpoint=config.labeler_checkpoint,
        labeler_pretrained=config.labeler_pretrained,
        labeler_classes=config.labeler_classes,
        img_size=config.img_size,
    )


def open_labels(config: StudentConfig, stage: Stage) -> LabelSource:
    """The source that the settings name.

    Raises:
        StlError: labels that are not there, damaged, or do not belong to the images.
    """
    if config.labels == ("none",):
        return LabelSource(stage)
    if config.labels == ("online",):
        return OnlineLabels(stage, labeler_of(config), config)
    return DumpedLabels(stage, [open_label_set(place) for place in config.labels], config)


def check_labels(config: StudentConfig) -> list[LabelSet]:
    """Check the label sets and how they are to be read, before images are packed; gives the sets, if there are any.

    Raises:
        StlError: label sets that are not there or damaged, or do not go with the settings.
    """
    share = class_share(config.class_target)
    if share and {"none", "online"} & set(config.labels):
        raise InputError("`class_target` other than own needs label sets as `labels`")
    if config.labels == ("online",):
        check_labeler(config.labeler, config.labeler_checkpoint, config.labeler_pretrained)
    if {"none", "online"} & set(config.labels):
        return []
    label_sets = [open_label_set(place) for place in config.labels]
    how_read(label_sets, config)
    return label_sets


def how_read(label_sets: list[LabelSet], config: StudentConfig) -> tuple[list[bool], LabelChoice | None]:
    """Whether crops are replayed, of each set or family of sets, and which of these a sample reads.

    Raises:
        InputError: the settings do not go with the sets.
    """
    specs = [label_set.spec for label_set in label_sets]
    check_use(specs, config.residual, config.min_confidence)
    if class_share(config.class_target):
        check_class_answers(specs)
    groups = _as_one(label_sets, config)
    firsts = [group[0] for group in groups]
    replays = [_is_replayed(label_set, config.crops) for label_set in firsts]
    for group, replayed in zip(groups, replays, strict=True):
        crops = sum(label_set.spec.views_per_image for label_set in group)
        if replayed and crops < config.repeats:
            raise InputError(
                f"{group[0].place} holds {crops} crops of each image, and `repeats` {config.repeats} would show one of "
                f"them several times in a batch; use at most {crops} `repeats`"
            )
    return replays, choose_between(firsts, config.labels_pick, config.labels_share, config.seed)


def _as_one(label_sets: Sequence[LabelSet], config: StudentConfig) -> list[list[LabelSet]]:
    """The sets, those that hold different views of one family together; each alone where a choice between is set."""
    if config.labels_pick != "auto" or config.labels_share is not None:
        return [[label_set] for label_set in label_sets]
    return group_families(label_sets)


def warn_of_other_pixels(label_sets: Sequence[LabelSet], interpolation: str) -> None:
    """Log one warning per label set that was made from images resized or decoded in another way than the student's."""
    for label_set in label_sets:
        seen = label_set.spec.preprocessing
        theirs, ours = (seen["interpolation"], seen["decoder"]), (interpolation, DECODER)
        if theirs != ours:
            _LOGGER.warning(
                "%s was labelled on images resized by %s (decoder %s); "
                "this student sees them resized by %s (decoder %s)",
                *(label_set.place, *theirs, *ours),
            )


def warn_of_other_crops(label_sets: Sequence[LabelSet], scale_min: float, flip: float) -> None:
    """Log one warning per label set whose replayed crops have another distribution than the student's settings."""
    for label_set in label_sets:
        crops = label_set.spec.views
        if (crops["scale"], crops["flip"]) != ([scale_min, 1.0], flip):
            _LOGGER.warning(
                "%s holds crops of %s of the area, flipped with probability %s, and this student replays them: its "
                "`scale_min` %g and `flip` %g have no effect on images that read this set",
                *(label_set.place, crops["scale"], crops["flip"], scale_min, flip),
            )


def tell_of_reading(groups: Sequence[Sequence[LabelSet]], sources: Sequence[ViewsAhead]) -> None:
    """Log one warning per source whose shards are read again for most of its token caches."""
    for group, source in zip(groups, sources, strict=True):
        read, held = source.bytes_read()
        if read > _MOST_READS * held:
            _LOGGER.warning(
                "%s: token caches hold %d of its %d views each, and its shards more: to train once on each view reads "
                "%.1f GB, for %.1f GB of labels; `convert(views_per_part=%d)` divides the set, to read them once",
                *(group[0].place, source.span, source.spec.views_per_image, read / 1e9, held / 1e9, source.span),
            )


def _tell_of_weight(caches: Sequence[TokenCache]) -> None:
    """Log by how much the token loss outweighs its weight where labels leave out much of the probability."""
    for cache in caches:
        if cache.draws is not None:
            continue
        some = cache.probabilities[np.flatnonzero(cache.labelled)[:_LOOKED_AT]]
        mass = float(some.sum(axis=-1).mean())
        if mass < _LITTLE_MASS:
            _LOGGER.info(
                "the stored classes hold %.0f%% of the probability; `residual=ignore` leaves the rest out, so that the "
                "token loss counts as %.1f times its weight (`token_norm=tokens` keeps the weight)",
                *(100 * mass, 1 / mass),
            )


def _tell_of_classes(
    labels: TokenLabels, epoch: int, labelled: np.ndarray, views: np.ndarray, maps: np.ndarray, chosen: np.ndarray
) -> None:
    """Log a warning where soft targets keep fewer classes than draws name: no residual stands for the others."""
    is_drawn = np.array([cache.draws is not None for cache in labels.caches])
    some = labelled[is_drawn[chosen[labelled]]][:_LOOKED_AT_CLASSES]
    if not len(some):
        return
    kept = min(labels.targets.m, labels.num_classes)
    most = min(labels.num_classes, max(kept, _MOST_CLASSES))
    # Draws leave no residual; that of other sets would need the images' classes, or a column.
    wider = TokenLabels(replace(labels.targets, m=most, min_confidence=0.0, residual="ignore"), labels.cache)
    _, weights = wider(some, views[some], epoch, map_index=maps[some], cache_index=chosen[some])
    shares = np.cumsum(-np.sort(-weights, axis=-1), axis=-1).mean(axis=(0, 1))
    if shares[kept - 1] < _ALMOST_ALL:
        enough = np.flatnonzero(shares >= _ALMOST_ALL)
        _LOGGER.warning(
            "soft targets keep the %d most probable classes of a token, and drop %.0f%% of the probability that draws "
            "stand for; %s classes would drop less than %.0f%% (`soft_classes`), and `token_target=gumbel` drops none",
            *(kept, 100 * (1 - shares[kept - 1])),
            *(enough[0] + 1 if len(enough) else f"more than {most}", 100 * (1 - _ALMOST_ALL)),
        )


def _is_replayed(label_set: LabelSet, crops: str) -> bool:
    has_crops = label_set.spec.views["kind"] == "random"
    replay = has_crops if crops == "auto" else crops == "replay"
    if replay and not has_crops:
        raise InputError(
            f'{label_set.place} holds labels of whole images, no crops to replay; use `crops="random"`, or dump with '
            "`crops_per_image`"
        )
    if has_crops and not replay:
        raise InputError(
            f"{label_set.place} holds labels of {label_set.spec.views_per_image} crops, not of whole images; "
            'use `crops="replay"`, or dump without `crops_per_image`'
        )
    return replay


def _join(label_sets: Sequence[LabelSet], stage: Stage, config: StudentConfig, named: bool) -> ViewsAhead:
    beton = stage.train
    images = (rename_keys(beton.keys, config.key_prefix), beton.content_hashes, beton.class_names)
    policy = {"match": config.match, "missing": config.missing, "allow_changed": config.allow_changed}
    try:
        parts = [part for label_set in label_sets for part in label_set.parts]
        return ViewsAhead(CacheMaker(parts, *images, **policy), config.repeats)
    except JoinError as error:
        if not named:
            raise
        raise JoinError(f"{label_sets[0].place}: {error}") from error


def _check_classes(class_names: tuple[str, ...], stage: Stage, whose: str) -> None:
    if tuple(class_names) != tuple(stage.train.class_names):
        raise JoinError(
            f"the classes of {whose} ({len(class_names)}: {', '.join(class_names[:3])}, …) are not those of the "
            f"images ({len(stage.train.class_names)}: {', '.join(stage.train.class_names[:3])}, …)"
        )


def _renormalise(images: Tensor, stage: Stage, labeler: Any) -> Tensor:
    """From the student's mean and std to the labeler's."""
    if tuple(labeler.mean) == tuple(stage.mean) and tuple(labeler.std) == tuple(stage.std):
        return images
    ours, theirs = (
        [upload(torch.tensor(values), images.device)[:, None, None] for values in pair]
        for pair in ((stage.mean, stage.std), (labeler.mean, labeler.std))
    )
    return (images * ours[1] + ours[0] - theirs[0]) / theirs[1]
