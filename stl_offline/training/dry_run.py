"""``--dry-run`` of the two stages: the settings, steps, time and memory of a run, found out without writing anything.

B: images of a batch.
"""

import tempfile
from typing import Any, ClassVar

import torch
from torch import Tensor

from stl_offline.config import StudentConfig, TrainConfig
from stl_offline.device import pick_device
from stl_offline.distributed import join_world, leaving_world
from stl_offline.evaluation import match_classes
from stl_offline.geometry import whole_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import find_packed, pack_sample
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.views_ahead import run_bytes
from stl_offline.loader import Batch, check_shares
from stl_offline.settings import OUTSIDE
from stl_offline.targets import TokenTargets
from stl_offline.training.label_sources import LabelSource, OnlineLabels, TokenSource, check_labels, labeler_of
from stl_offline.training.setup import (
    Stage,
    build_stage,
    check_early,
    check_single_images,
    make_run_folder,
    validation_batch,
)
from stl_offline.training.step_timer import DryRun, StepTimer, measure, parameter_bytes
from stl_offline.training.steps import Objective, StepRandom
from stl_offline.training.train_labeler import LabelerObjective
from stl_offline.training.train_student import StudentObjective


def dry_run(config: TrainConfig, stage_name: str) -> DryRun:
    """Build what a run would use and take a few of its steps on made-up images.

    Raises:
        StlError: what the run itself would raise before its first step, but for what takes a join of labels with
            images, or, of images that are not packed yet, their content.
    """
    check_early(config)
    with tempfile.TemporaryDirectory(prefix="stl-offline-") as folder, leaving_world():
        device = pick_device(config.device)
        world = join_world(device)
        train, images = _look(config.data, folder, config)
        val, val_images = _look(config.val, folder, config) if config.val else (None, 0)
        stage = build_stage(config, stage_name, train, val, device, world)
        if val is not None:
            match_classes(val, train.class_names, "the training images")
            check_shares(val_images, validation_batch(config), world.size)
        check_shares(images, config.batch_size * config.accumulate, world.size, config.repeats)
        check_single_images(stage, images)
        make_run_folder(stage, None).look(config.resume)
        timer = _StageTimer(stage)
        rows, columns = stage.model.grid_size(config.img_size, config.img_size)
        return measure(
            timer,
            images,
            val_images,
            f"{rows}×{columns} tokens",
            {"color_jitter": stage.augmentation.jitter},
            cache=sum(run_bytes(spec, images, config.repeats) for spec in timer.label_specs),
        )


def _look(spec: str, folder: str, config: TrainConfig) -> tuple[Beton, int]:
    """The packed images, or two of those that are not packed yet, and how many there are."""
    packed = find_packed(spec, skip_broken=config.skip_broken)
    if packed is not None:
        return packed, len(packed)
    return pack_sample(spec, 2, folder, skip_broken=config.skip_broken)


class _GivenLabels(TokenSource):
    """Token targets that a batch brings with it."""

    def targets(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        return batch.token_ids, batch.token_weights


class _StageTimer(StepTimer):
    """Takes a stage's steps on made-up images.

    targets: per token, that a batch brings with it; label_specs: of the label sets.
    """

    run: Stage
    alone: ClassVar[dict[str, Any]] = StepTimer.alone | {"repeats": 1}  # whose crops they are makes no difference

    def __init__(self, stage: Stage) -> None:
        self.generator = torch.Generator().manual_seed(stage.config.seed)
        self.targets = 0
        self.label_specs: list[LabelSpec] = []
        super().__init__(stage)

    @property
    def pixels(self) -> int:
        return self.own.img_size**2

    def objective(self) -> Objective:
        config = self.run.config
        if not isinstance(config, StudentConfig):
            return LabelerObjective(self.run)
        if config.labels == ("none",):
            return StudentObjective(self.run, LabelSource(self.run))
        if config.labels == ("online",):
            online = OnlineLabels(self.run, labeler_of(config), config)
            self.held = parameter_bytes(online.labeler)
            return StudentObjective(self.run, online)
        self.label_specs = [label_set.spec for label_set in check_labels(self.own)]
        best = max(spec.top_k for spec in self.label_specs)
        targets = TokenTargets(config.token_target, (1, 1), m=config.soft_classes, residual=config.residual)
        self.targets = targets.targets_per_token(best)
        return StudentObjective(self.run, _GivenLabels(self.run, config))

    def batch(self, count: int) -> Batch:
        stage, device, side = self.run, self.run.device, self.run.config.img_size
        images = torch.randn(count, 3, side, side, generator=self.generator)
        ids = weights = None
        if self.targets:
            rows, columns = stage.model.grid_size(side, side)
            shape = (count, rows * columns, self.targets)
            ids = torch.zeros(shape, dtype=torch.int64, device=device)
            if self.own.residual == "ghost":
                ids[..., -1] = OUTSIDE
            weights = torch.full(shape, 1 / self.targets, device=device)
        warps = stage.augmentation.warps(0, count)
        return Batch(
            images=images.to(device).to(memory_format=torch.channels_last),
            class_ids=torch.zeros(count, dtype=torch.int64, device=device),
            token_ids=ids,
            token_weights=weights,
            views=torch.from_numpy(whole_views(count)),
            sample_ids=torch.arange(count),
            epochs=torch.zeros(count, dtype=torch.int64),
            warps=None if warps is None else torch.from_numpy(warps),
        )
