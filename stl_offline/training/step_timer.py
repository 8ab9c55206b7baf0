"""What a training run would be, found out by a few of its steps: the arithmetic of ``--dry-run``."""

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from stl_offline.device import amp_name, pick_workers
from stl_offline.distributed import World
from stl_offline.errors import counted
from stl_offline.training.optimization import TrainStep, learning_rate, warmup_steps
from stl_offline.training.setup import TrainingRun
from stl_offline.training.steps import Objective

# A step is measured on as many images as go in about this time; one step before it, and as many more as fit.
_SECONDS = 8.0
_STEPS = 3
_GIB = 1 << 30


@dataclass(frozen=True)
class DryRun:
    """What a run would be.

    settings: resolved, by name; images, validation_images: of the data; parameters: of the model; outputs: its tokens
    or feature maps, in words; step_images: of all processes in a step; steps, epoch_steps, warmup: counts; lr: the
    largest; image_seconds: of one process, measured on ``measured`` images per step; seconds: of all training steps;
    memory: bytes of one process (weights, gradients, optimiser, average, an online labeler's weights, what backward
    needs of a batch; on a GPU with the run's own batch, CUDA's peak; and a step's images twice, as loaded and as
    augmented); cache: bytes that token caches take on disk at a time, at most.
    """

    settings: dict[str, Any]
    processes: int
    images: int
    validation_images: int
    parameters: int
    outputs: str
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
            f"model       {self.parameters:,} parameters, {self.outputs}",
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


def measure(
    timer: "StepTimer", images: int, validation_images: int, outputs: str, settings: dict[str, Any], cache: int = 0
) -> DryRun:
    """Take a few steps, and work out what the whole run would be.

    Args:
        images, validation_images: of the run's data; outputs, cache: as in `DryRun`.
        settings: as this machine resolves them, where they are not in the run's configuration.
    """
    run, config, world = timer.run, timer.own, timer.world
    step_images = config.batch_size * config.accumulate * world.size
    epoch_steps = -(-images // step_images)
    batch, seconds = timer.choose_batch()
    taken = max(1, min(_STEPS, round(_SECONDS / seconds)))
    seconds = min([seconds, *(timer.take(batch) for _ in range(taken))])
    each = seconds / batch
    resolved = {"device": str(run.device), "workers": pick_workers(config.workers), "amp": amp_name(run.amp)}
    return DryRun(
        settings=dataclasses.asdict(config) | resolved | settings,
        processes=world.size,
        images=images,
        validation_images=validation_images,
        parameters=sum(parameter.numel() for parameter in run.model.parameters()),
        outputs=outputs,
        step_images=step_images,
        epoch_steps=epoch_steps,
        steps=epoch_steps * config.epochs,
        warmup=warmup_steps(config, epoch_steps),
        lr=learning_rate(config, world.size),
        image_seconds=each,
        measured=batch,
        seconds=each * images / world.size * config.epochs,
        memory=timer.memory(batch),
        cache=cache,
        is_first=world.is_first,
    )


class StepTimer(ABC):
    """Takes real training steps on batches of any size: alone, uncompiled, each batch as one part.

    run: what is trained, with settings for that; own, world: the run's own settings and processes; held: bytes that
    the device holds besides the model's.
    """

    held = 0
    alone: ClassVar[dict[str, Any]] = {"compile": False, "accumulate": 1}  # settings of a step that is taken alone

    def __init__(self, run: TrainingRun) -> None:
        self.own, self.world = run.config, run.world
        config = dataclasses.replace(run.config, **self.alone)
        self.run = dataclasses.replace(run, config=config, world=World())
        self.step = TrainStep(self.run, self.objective(), 1)
        self.step.model.train()
        self.taken = self.saved = 0

    @abstractmethod
    def objective(self) -> Objective:
        """What is learned."""

    @abstractmethod
    def batch(self, count: int) -> Any:
        """A batch of ``count`` images."""

    @property
    @abstractmethod
    def pixels(self) -> int:
        """Pixels of an image that the model sees."""

    def choose_batch(self) -> tuple[int, float]:
        """The largest batch whose step takes no longer than it should, up to the run's own; and its seconds."""
        batch = min(2, self.own.batch_size)  # batch norms may need more than one image
        self.take(batch)
        seconds = self.take(batch)
        while batch < self.own.batch_size and seconds < _SECONDS / 4:
            batch = min(batch * 2, self.own.batch_size)
            seconds = self.take(batch)
        return batch, seconds

    def take(self, count: int) -> float:
        """One step on ``count`` images; its seconds."""
        batch = self.batch(count)
        counted = SavedBytes(self.step.model.parameters())
        self._wait()
        started = time.perf_counter()
        with counted:
            self.step(batch, self.taken).numbers()
        self._wait()
        self.taken += 1
        self.saved = max(counted.bytes // count, 1)
        return time.perf_counter() - started

    def memory(self, batch: int) -> int:
        """Bytes of one process at the run's own batch size."""
        config, device = self.own, self.run.device
        step_images = 2 * config.batch_size * config.accumulate * 3 * self.pixels * 4
        if device.type == "cuda" and batch == config.batch_size:
            return torch.cuda.max_memory_allocated(device) + step_images
        copies = 4 + (self.step.average is not None)  # weights, gradients, AdamW's two moments, the average
        return parameter_bytes(self.step.model) * copies + self.held + self.saved * config.batch_size + step_images

    def _wait(self) -> None:
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts what the code inside keeps for backward, each piece of memory once; the model's own weights aside."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.bytes = 0
        self.seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        super().__init__(self._count, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        super().__enter__()
        return self

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.seen:
            self.seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor


def parameter_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights."""
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
