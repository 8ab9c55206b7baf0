"""``--dry-run``: the settings, steps, time and memory of a run, found out without writing anything.

B: images of a batch.
"""

import dataclasses
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stl_offline.config import StudentConfig, TrainConfig
from stl_offline.device import amp_name, pick_device, pick_workers
from stl_offline.distributed import World, join_world, leaving_world
from stl_offline.errors import counted
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
from stl_offline.training.optimization import TrainStep, learning_rate, warmup_steps
from stl_offline.training.setup import Stage, build_stage, check_early, make_run_folder, validation_batch
from stl_offline.training.steps import Objective, StepRandom
from stl_offline.training.train_labeler import LabelerObjective
from stl_offline.training.train_student import StudentObjective

# A step is measured on as many images as go in about this time; one step before it, and as many more as fit.
_SECONDS = 8.0
_STEPS = 3
_GIB = 1 << 30


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    settings: resolved, by name; images, validation_images: of the data; parameters: of the model; tokens: its grid;
    step_images: of all processes in a step; steps, epoch_steps, warmup: counts; lr: the largest; image_seconds: of
    one process, measured on ``measured`` images per step; seconds: of all training steps; memory: bytes of one process
    (weights, gradients, optimiser, average, an online labeler's weights, what backward needs of a batch; on a GPU with
    the run's own batch, CUDA's peak; and a step's images twice, as loaded and as augmented); cache: bytes that token
    caches take on disk at a time, at most.
    """

    settings: dict[str, Any]
    processes: int
    images: int
    validation_images: int
    parameters: int
    tokens: tuple[int, int]
    step_images: int
    epoch_steps: int
    steps: int
    warmup: int
    lr: float
    image_seconds: float
    measured: int
    seconds: float
    memory: int
    cache: int
    is_first: bool = True

    def lines(self) -> list[str]:
        """What is printed."""
        width = max(len(name) for name in self.settings)
        rate = self.processes / self.image_seconds
        exchange = " and communication between processes" if self.processes > 1 else ""
        return [
            *(f"{name:<{width}}  {_shown(value)}" for name, value in self.settings.items()),
            "",
            f"data        {counted(self.images, 'image')} to learn from, {self.validation_images:,} to measure on",
            f"model       {self.parameters:,} parameters, {self.tokens[0]}×{self.tokens[1]} tokens",
            f"processes   {self.processes}",
            f"step        {counted(self.step_images, 'image')}, learning rate up to {self.lr:g}",
            f"steps       {self.steps:,} ({self.epoch_steps:,} per epoch, the first {self.warmup:,} of them warm-up)",
            f"speed       {rate:,.1f} images per second (loading and validation{exchange} not counted; in "
            f"steps of {counted(self.measured, 'image')})",
            f"time        {_duration(self.seconds)} of training steps",
            f"memory      {self.memory / _GIB:.2f} GiB per process, libraries and loading not counted",
            *([f"disk        {self.cache / 1e9:.2f} GB of token cache at most"] if self.cache else []),
            "nothing was written",
        ]


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
        check_shares(images, config.batch_size * config.accumulate, world.size)
        make_run_folder(stage, None).look(config.resume)
        return _measure(stage, images, val_images)


def _look(spec: str, folder: str, config: TrainConfig) -> tuple[Beton, int]:
    """The packed images, or two of those that are not packed yet, and how many there are."""
    packed = find_packed(spec, skip_broken=config.skip_broken)
    if packed is not None:
        return packed, len(packed)
    return pack_sample(spec, 2, folder, skip_broken=config.skip_broken)


def _measure(stage: Stage, images: int, val_images: int) -> DryRun:
    config, world = stage.config, stage.world
    step_images = config.batch_size * config.accumulate * world.size
    epoch_steps = -(-images // step_images)
    timer = _StepTimer(stage)
    batch, seconds = timer.choose_batch()
    taken = max(1, min(_STEPS, round(_SECONDS / seconds)))
    seconds = min([seconds, *(timer.take(batch) for _ in range(taken))])
    each = seconds / batch
    return DryRun(
        settings=dataclasses.asdict(config)
        | {
            "device": str(stage.device),
            "workers": pick_workers(config.workers),
            "amp": amp_name(stage.amp),
            "color_jitter": stage.augmentation.jitter,
        },
        processes=world.size,
        images=images,
        validation_images=val_images,
        parameters=sum(parameter.numel() for parameter in stage.model.parameters()),
        tokens=tuple(stage.model.grid_size(config.img_size, config.img_size)),
        step_images=step_images,
        epoch_steps=epoch_steps,
        steps=epoch_steps * config.epochs,
        warmup=warmup_steps(config, epoch_steps),
        lr=learning_rate(config, world.size),
        image_seconds=each,
        measured=batch,
        seconds=each * images / world.size * config.epochs,
        memory=timer.memory(batch),
        cache=sum(run_bytes(spec, images) for spec in timer.label_specs),
        is_first=world.is_first,
    )


class _GivenLabels(TokenSource):
    """Token targets that a batch brings with it."""

    def targets(self, batch: Batch, random: StepRandom) -> tuple[Tensor, Tensor]:
        return batch.token_ids, batch.token_weights


class _StepTimer:
    """Takes real training steps on made-up batches of any size: alone, uncompiled, each batch as one part."""

    def __init__(self, stage: Stage) -> None:
        self.own = stage.config
        config = dataclasses.replace(stage.config, compile=False, accumulate=1)
        self.stage = stage = dataclasses.replace(stage, config=config, world=World())
        self.generator = torch.Generator().manual_seed(config.seed)
        self.targets = 0  # per token, that a batch brings with it
        self.labeler: nn.Module | None = None
        self.label_specs: list[LabelSpec] = []
        self.step = TrainStep(stage, self._objective(), 1)
        self.step.model.train()
        self.taken = self.saved = 0

    def choose_batch(self) -> tuple[int, float]:
        """The largest batch whose step takes no longer than it should, up to the run's own; and its seconds."""
        batch, seconds = 1, self.take(1)
        seconds = self.take(1)
        while batch < self.own.batch_size and seconds < _SECONDS / 4:
            batch = min(batch * 2, self.own.batch_size)
            seconds = self.take(batch)
        return batch, seconds

    def take(self, count: int) -> float:
        """One step on ``count`` images; its seconds."""
        batch = self._batch(count)
        counted = _SavedBytes(self.step.model.parameters())
        self._wait()
        started = time.perf_counter()
        with counted:
            self.step(batch, self.taken)
        self._wait()
        self.taken += 1
        self.saved = max(counted.bytes // count, 1)
        return time.perf_counter() - started

    def memory(self, batch: int) -> int:
        """Bytes of one process at the run's own batch size."""
        config, device = self.own, self.stage.device
        step_images = 2 * config.batch_size * config.accumulate * 3 * config.img_size**2 * 4
        if device.type == "cuda" and batch == config.batch_size:
            return torch.cuda.max_memory_allocated(device) + step_images
        copies = 4 + (self.step.average is not None)  # weights, gradients, AdamW's two moments, the average
        weights = _bytes(self.step.model) * copies + (0 if self.labeler is None else _bytes(self.labeler))
        return weights + self.saved * config.batch_size + step_images

    def _objective(self) -> Objective:
        config = self.stage.config
        if not isinstance(config, StudentConfig):
            return LabelerObjective(self.stage)
        if config.labels == ("none",):
            return StudentObjective(self.stage, LabelSource(self.stage))
        if config.labels == ("online",):
            online = OnlineLabels(self.stage, labeler_of(config), config)
            self.labeler = online.labeler
            return StudentObjective(self.stage, online)
        self.label_specs = [label_set.spec for label_set in check_labels(config)]
        best = max(spec.top_k for spec in self.label_specs)
        targets = TokenTargets(config.token_target, (1, 1), m=config.soft_classes, residual=config.residual)
        self.targets = targets.targets_per_token(best)
        return StudentObjective(self.stage, _GivenLabels(self.stage, config))

    def _batch(self, count: int) -> Batch:
        stage, device, side = self.stage, self.stage.device, self.stage.config.img_size
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
            sample_ids=torch.arange(count, device=device),
            warps=None if warps is None else torch.from_numpy(warps),
        )

    def _wait(self) -> None:
        if self.stage.device.type == "cuda":
            torch.cuda.synchronize(self.stage.device)


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the code inside keeps for backward, each piece of memory once; the model's own weights aside."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self) -> "_SavedBytes":
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def _bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return ", ".join(str(each) for each in value)
    return "–" if value is None else str(value)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
