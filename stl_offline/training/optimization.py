"""One optimiser step, and what it works with: timm's optimiser, schedule and averaged weights, set as in STL's recipe.

A step's images come in one batch of ``accumulate · batch_size``, are augmented and mixed as one, and go through the
model in ``accumulate`` parts. Each part's loss counts by its share of the whole step (`stl_offline.training.steps`),
over all processes, so that neither parts nor processes change what is minimised.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.optim
import torch
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stl_offline.config import RunConfig
from stl_offline.device import Readback, avoid_slow_attention, upload
from stl_offline.distributed import share_batch_statistics, sum_over_world_blocking
from stl_offline.errors import TrainingError
from stl_offline.training.setup import TrainingRun
from stl_offline.training.steps import Inputs, Objective, Share, StepRandom

MIN_LR = 1e-6
WARMUP_LR = 1e-6


def learning_rate(config: RunConfig, processes: int) -> float:
    """The largest learning rate: as set, or scaled from ``lr_batch`` images per step to those of all processes."""
    if not config.lr_batch:
        return config.lr
    return config.lr * config.batch_size * config.accumulate * processes / config.lr_batch


def make_optimizer(
    model: nn.Module, config: RunConfig, lr: float, groups: list[dict[str, Any]] | None = None
) -> torch.optim.Optimizer:
    """AdamW; no weight decay for biases, norms and what the model's ``no_weight_decay`` names.

    With ``layer_decay`` each layer, as the model's ``group_matcher`` numbers them, learns at that factor of the rate of
    the one after it. ``groups``, where given, replace both.

    Fused: one pass over all tensors, several times as fast as one tensor after the other for small models on CPUs.
    """
    fused = {"fused": True} if next(model.parameters()).device.type in ("cpu", "cuda") else {}
    if groups is None and config.layer_decay < 1:
        fused["layer_decay"] = config.layer_decay
    parameters = model if groups is None else groups
    return timm.optim.create_optimizer_v2(parameters, opt="adamw", lr=lr, weight_decay=config.weight_decay, **fused)


def warmup_steps(config: RunConfig, steps_per_epoch: int) -> int:
    """Steps of rising learning rate: as set, but a fifth of the run at most."""
    return min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch // 5)


def make_schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps_per_epoch: int) -> Scheduler:
    """Linear warm-up from 1e-6, then a cosine (or, with the schedule "poly", a straight line) to 1e-6, step by step."""
    lr = optimizer.param_groups[0]["lr"]
    warmup = warmup_steps(config, steps_per_epoch)
    settings = {
        "t_initial": max(1, config.epochs * steps_per_epoch - warmup),
        "lr_min": min(MIN_LR, lr),
        "warmup_t": warmup,
        "warmup_lr_init": min(WARMUP_LR, lr),
        "warmup_prefix": True,
        "t_in_epochs": False,
    }
    if config.schedule == "poly":
        return PolyLRScheduler(optimizer, power=1.0, **settings)
    return CosineLRScheduler(optimizer, **settings)


def count_parts(accumulate: int, own: int, totals: Tensor, processes: int, crops: int) -> int:
    """In how many parts a step is taken: the same in all processes, each of which has at least one image for each part.

    Args:
        own: images of this process; totals: of all, as `Inputs.totals` has them.
        crops: of each image in a batch. The images of two processes' batches differ by this many at most.
    """
    if own >= accumulate + crops:  # so no process has fewer than ``accumulate``; else the device is waited for
        return accumulate
    return min(accumulate, int(totals[0]) // crops // processes * crops)


def make_average(model: nn.Module, config: RunConfig) -> ModelEmaV3 | None:
    """Exponential moving average of the weights.

    Its decay warms up as 1 − 9 / (9 + step), so that short runs average, too: over the last ninth of the steps so far,
    until that is what the decay itself averages over (0.99992: after 112,500 steps).
    """
    if not config.ema_decay:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)


@dataclass(frozen=True)
class StepNumbers:
    """What a step came to: means of the losses and the gradient's norm over all processes, by name; images of all
    processes; each note's sum over all processes."""

    values: dict[str, float]
    images: int
    notes: list[float]


class NotFiniteError(TrainingError):
    """A loss or a gradient is not finite. losses: this process's; in_this_process: whether they led to it."""

    def __init__(self, what: str, losses: dict[str, float], in_this_process: bool) -> None:
        super().__init__(what)
        self.losses, self.in_this_process = losses, in_this_process


class StepResult:
    """A step that was taken, whose numbers are on their way to the host.

    Args:
        inputs: this process's; set to None once they are not needed, since a result outlives the next step.
        losses: this process's sums, (,) float64 each.
        told: float64, summed over all processes: the losses, how many processes have one that is not finite, the notes.
        own: float64, the same in all processes: images of all processes, the gradient's norm, the scale of the loss.
        processes: how many there are.
    """

    def __init__(self, inputs: Inputs, losses: dict[str, Tensor], told: Tensor, own: Tensor, processes: int) -> None:
        self.inputs: Inputs | None = inputs
        self._losses, self._processes = losses, processes
        self._numbers = Readback(torch.cat([told, own]))

    def numbers(self) -> StepNumbers:
        """Wait for this step, and for none that was started after it.

        Raises:
            NotFiniteError: a loss is not finite, or the gradient is not, at a scale of the loss of 1.
        """
        *told, images, norm, scale = self._numbers.array().tolist()
        values = {name: number / self._processes for name, number in zip(self._losses, told, strict=False)}
        spoilt, *notes = told[len(self._losses) :]
        if spoilt:
            raise self._not_finite(f"loss is {values['loss']}", not math.isfinite(self._losses["loss"]))
        if not math.isfinite(norm) and scale <= 1:  # else a smaller scale may make it finite
            raise self._not_finite(f"gradient's norm is {norm}", True)
        return StepNumbers(values | {"gradient_norm": norm}, int(images), notes)

    def _not_finite(self, what: str, in_this_process: bool) -> NotFiniteError:
        return NotFiniteError(what, {name: float(value) for name, value in self._losses.items()}, in_this_process)


class TrainStep:
    """Takes optimiser steps: moves the run's model to its device, and holds all that changes with it.

    Args:
        run: the model, its settings, device and processes.
        objective: inputs and losses.
        steps_per_epoch: of the epochs that steps belong to; the schedule is made for it.
    """

    def __init__(self, run: TrainingRun, objective: Objective, steps_per_epoch: int) -> None:
        config, world, device = run.config, run.world, run.device
        self.config, self.world, self.device, self.objective = config, world, device, objective
        self.steps_per_epoch, self._crops_of, self._amp = steps_per_epoch, run.crops_of, run.amp
        self.model = run.model.to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.sync_bn and world.size > 1:
            share_batch_statistics(self.model)
        lr = learning_rate(config, world.size)
        self.optimizer = make_optimizer(self.model, config, lr, run.parameter_groups())
        self.schedule = make_schedule(self.optimizer, config, steps_per_epoch)
        self.average = make_average(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=run.amp is torch.float16)
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=not config.trains_all,
                gradient_as_bucket_view=True,
            )
        self.forward: nn.Module = self.parallel or self.model
        if config.compile:
            # Of its own for every batch size: which sizes came before must not shape what comes after a new start.
            self.forward = torch.compile(self.forward, dynamic=False)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, before any group's own factor."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)

    def __call__(self, batch: Any, step: int, notes: Callable[[], list[float]] = list) -> StepResult:
        """Take step number ``step``, counted from 0. Nothing here waits for the device.

        Losses and gradients that are not finite reach the weights; `StepResult.numbers` raises then, which comes before
        any weights are stored.

        Args:
            notes: gives numbers to sum over all processes with the losses; called after the backward pass.
        """
        random = StepRandom.of(self.config.seed, self.world.rank, step)
        # Dropout and drop path inside the model read torch's own generator: pinned to the step, too.
        torch.manual_seed(random.torch.initial_seed())
        self.schedule.step_update(step)
        inputs = self.objective.inputs(batch, random)
        totals = sum_over_world_blocking(inputs.totals(), self.world)
        self.optimizer.zero_grad(set_to_none=True)
        crops = self._crops_of(step // self.steps_per_epoch)
        with avoid_slow_attention(self.model, self.device, self._amp):
            losses = self._backward(inputs, totals, crops)
        finite = torch.isfinite(losses["loss"])
        told = torch.stack([*losses.values(), (~finite).double()])
        told = torch.cat([told, upload(np.array(notes(), dtype=np.float64), self.device)])
        told = sum_over_world_blocking(told, self.world)
        self.scaler.unscale_(self.optimizer)
        # The same in all processes, whose gradients are means over all of them.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        scale = self.scaler.scale(torch.ones((), device=self.device))
        own = torch.stack([totals[0], norm.double(), scale.double()])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.model, step=step + 1)
        return StepResult(inputs, losses, told, own, self.world.size)

    def averaged_model(self) -> nn.Module:
        """The averaged model where averaging is on, else the model itself."""
        return self.model if self.average is None else self.average.module

    def state(self) -> dict[str, object]:
        """Everything that steps change: what `restore` takes."""
        return {
            "model": self.model.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, state: dict[str, object]) -> None:
        """Go on from a stored state."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _backward(self, inputs: Inputs, totals: Tensor, crops: int) -> dict[str, Tensor]:
        """Gradients of a whole step, part by part; gives this process's sums of the losses, (,) float64 each."""
        count = self.config.accumulate
        if self.parallel is not None:
            count = count_parts(count, len(inputs), totals, self.world.size, crops)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(inputs.parts(count), 1):
            alone = self.parallel is not None and number < count
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                losses = self.objective.losses(self.forward, part, Share.of(part, totals, self.world.size))
                self.scaler.scale(losses["loss"]).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        return sums
