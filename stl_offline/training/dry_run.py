"""``--dry-run``: what a run would be and take, found out without writing anything.

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
from stl_offline.device import amp_name, autocast, pick_device, pick_workers
from stl_offline.distributed import join_world, leaving_world
from stl_offline.evaluation import match_classes
from stl_offline.images.beton import Beton
from stl_offline.images.pack import find_packed, pack_sample
from stl_offline.labels.label_set import open_label_set
from stl_offline.loader import check_shares
from stl_offline.losses import soft_cross_entropy, token_cross_entropy
from stl_offline.training.label_sources import OnlineLabels, how_read, labeler_of
from stl_offline.training.optimization import learning_rate, make_average, make_optimizer, warmup_steps
from stl_offline.training.setup import Stage, build_stage, check_early, validation_batch

# A step is measured on as many images as go in about this time; one step before it, and as many more as fit.
_SECONDS = 8.0
_STEPS = 3
_GIB = 1 << 30


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    settings: resolved, by name; images, validation_images: of the data; parameters: of the model; tokens: its grid;
    step_images: of all processes in a step; steps, epoch_steps, warmup: counts; lr: the largest; image_seconds: of
    one process, measured on ``measured`` images a step; seconds: of all training steps; memory: bytes of one process
    (weights, gradients, optimiser, average, an online labeler's weights, what backward needs of a batch; on a GPU with
    the run's own batch, CUDA's peak; and a step's images twice, as loaded and as augmented).
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
    is_first: bool = True

    def lines(self) -> list[str]:
        """What is printed."""
        width = max(len(name) for name in self.settings)
        rate = self.processes / self.image_seconds
        exchange = ", what processes tell each other" if self.processes > 1 else ""
        return [
            *(f"{name:<{width}}  {_shown(value)}" for name, value in self.settings.items()),
            "",
            f"data        {self.images:,} images to learn from, {self.validation_images:,} to measure on",
            f"model       {self.parameters:,} parameters, {self.tokens[0]}×{self.tokens[1]} tokens",
            f"processes   {self.processes}",
            f"step        {self.step_images:,} images, learning rate up to {self.lr:g}",
            f"steps       {self.steps:,} ({self.epoch_steps:,} an epoch, the first {self.warmup:,} of them warm-up)",
            f"speed       {rate:,.1f} images per second (loading, augmentation, measuring{exchange} not counted; in "
            f"steps of {self.measured} images)",
            f"time        {_duration(self.seconds)} of training steps",
            f"memory      {self.memory / _GIB:.2f} GiB a process, libraries and loading not counted",
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
        stage.run_folder().look(config.resume)
        return _measure(stage, images, val_images)


def _look(spec: str, folder: str, config: TrainConfig) -> tuple[Beton, int]:
    """The packed images, or two of those that are not packed yet, and how many there are."""
    packed = find_packed(spec, skip_broken=config.skip_broken)
    if packed is not None:
        return packed, len(packed)
    return pack_sample(spec, 2, folder, skip_broken=config.skip_broken)


def _measure(stage: Stage, images: int, val_images: int) -> DryRun:
    config, world = stage.config, stage.world
    model = stage.model.to(stage.device).train()
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    lr = learning_rate(config, world.size)
    stepper = _Stepper(stage, model, lr)
    batch, seconds = stepper.choose_batch()
    taken = max(1, min(_STEPS, round(_SECONDS / seconds)))
    seconds = min([seconds, *(stepper.take(batch) for _ in range(taken))])
    step_images = config.batch_size * config.accumulate * world.size
    epoch_steps = -(-images // step_images)
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
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        tokens=tuple(model.grid_size(config.img_size, config.img_size)),
        step_images=step_images,
        epoch_steps=epoch_steps,
        steps=epoch_steps * config.epochs,
        warmup=warmup_steps(config, epoch_steps),
        lr=lr,
        image_seconds=each,
        measured=batch,
        seconds=each * images / world.size * config.epochs,
        memory=stepper.memory(batch),
        is_first=world.is_first,
    )


class _Stepper:
    """Takes training steps on made-up images and labels of any batch size."""

    def __init__(self, stage: Stage, model: nn.Module, lr: float) -> None:
        self.stage, self.model = stage, model
        self.optimizer = make_optimizer(model, stage.config, lr)
        self.average = make_average(model, stage.config)
        self.generator = torch.Generator().manual_seed(stage.config.seed)
        self.labeler = None
        self.columns = 0
        config = stage.config
        if isinstance(config, StudentConfig) and config.labels != ("none",):
            self.columns = config.soft_classes if config.token_target == "soft" else 1
            if config.labels == ("online",):
                self.labeler = OnlineLabels(stage, labeler_of(config), config).labeler
            else:
                how_read([open_label_set(place) for place in config.labels], config)
        self.saved = 0

    def choose_batch(self) -> tuple[int, float]:
        """The largest batch whose step takes no longer than it should, up to the run's own; and its seconds."""
        batch, seconds = 1, self.take(1)
        seconds = self.take(1)
        while batch < self.stage.config.batch_size and seconds < _SECONDS / 4:
            batch = min(batch * 2, self.stage.config.batch_size)
            seconds = self.take(batch)
        return batch, seconds

    def take(self, batch: int) -> float:
        """One step; its seconds."""
        stage, device = self.stage, self.stage.device
        side, classes = stage.config.img_size, len(stage.train.class_names)
        images = torch.randn(batch, 3, side, side, generator=self.generator)
        images = images.to(device).to(memory_format=torch.channels_last)
        targets = torch.full((batch, classes), 1 / classes, device=device)
        counted = _SavedBytes(self.model.parameters())
        self._wait()
        started = time.perf_counter()
        if self.labeler is not None:
            with torch.inference_mode(), autocast(device, stage.amp):
                self.labeler(images)
        with counted, autocast(device, stage.amp):
            class_logits, token_logits = self.model(images)
            loss = soft_cross_entropy(class_logits, targets) + self._token_loss(token_logits, targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.model)
        self._wait()
        self.saved = max(counted.bytes // batch, 1)
        return time.perf_counter() - started

    def memory(self, batch: int) -> int:
        """Bytes of one process at the run's own batch size."""
        config, device, own = self.stage.config, self.stage.device, self.stage.config.batch_size
        step_images = 2 * own * config.accumulate * 3 * config.img_size**2 * 4
        if device.type == "cuda" and batch == own:
            return torch.cuda.max_memory_allocated(device) + step_images
        copies = 4 + (self.average is not None)  # weights, gradients, AdamW's two moments, the average
        weights = _bytes(self.model) * copies + (0 if self.labeler is None else _bytes(self.labeler))
        return weights + self.saved * own + step_images

    def _token_loss(self, token_logits: Tensor, targets: Tensor) -> Tensor:
        if self.columns == 0:
            return soft_cross_entropy(token_logits.float().mean(dim=1), targets)
        shape = (*token_logits.shape[:2], self.columns)
        ids = torch.zeros(shape, dtype=torch.int64, device=token_logits.device)
        weights = torch.full(shape, 1 / self.columns, device=token_logits.device)
        return token_cross_entropy(token_logits, ids, weights, self.stage.config.smoothing)

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
