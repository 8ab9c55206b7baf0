"""The loop that both stages share: batches in, weights out, resumable to the sample.

Every step's randomness comes from (seed, step), every view from (seed, epoch, sample), the order from (seed, epoch).
So a run that goes on from a stored state takes the steps that it would have taken.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stl_offline.artifact import WEIGHTS_NAME, ModelDescription, save_model
from stl_offline.config import TrainConfig
from stl_offline.device import pick_amp
from stl_offline.distributed import World, sum_over_world, wait_for_world
from stl_offline.errors import TrainingError
from stl_offline.loader import Batch, TokenLoader
from stl_offline.progress import progress_bar
from stl_offline.scoring import Scores, evaluate_model
from stl_offline.training.interrupt import StopRequest, stop_request
from stl_offline.training.optimization import make_average, make_optimizer, make_schedule
from stl_offline.training.run_folder import RunFolder

SAVE_SECONDS = 300.0  # between stored states within an epoch


@dataclass(frozen=True)
class StepRandom:
    """The generators of one step: both are functions of (seed, rank, step) alone."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, rank: int, step: int) -> "StepRandom":
        numpy = np.random.Generator(np.random.Philox(key=[seed, rank << 40 | step]))
        generator = torch.Generator().manual_seed(int(numpy.integers(2**62)))
        return cls(numpy, generator)


# A stage's loss: (model, batch, the step's generators) → named parts, of which "loss" is the sum to minimise.
LossFunction = Callable[[nn.Module, Batch, StepRandom], dict[str, Tensor]]
# What an epoch shows: epoch → arguments of TokenLoader.epoch (views, and which stored map to read).
EpochPlan = Callable[[int], dict[str, Any]]


class Trainer:
    """One training run.

    Args:
        model: on its device.
        loader: training batches.
        loss: the stage's loss.
        plan: what each epoch shows.
        validation: a function that scores a model, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: nn.Module,
        loader: TokenLoader,
        loss: LossFunction,
        plan: EpochPlan,
        validation: "Validation | None",
        description: ModelDescription,
        device: torch.device,
        world: World,
    ) -> None:
        self.config, self.folder, self.loader, self.loss, self.plan = config, folder, loader, loss, plan
        self.validation, self.description, self.device, self.world = validation, description, device, world
        self.model = model.to(device).to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(self.model, config)
        self.schedule = make_schedule(self.optimizer, config, len(loader))
        self.average = make_average(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=pick_amp(config.amp, device) is torch.float16)
        self.step_model: nn.Module = self.model
        if world.size > 1:
            self.step_model = DistributedDataParallel(
                self.model, device_ids=[device] if device.type == "cuda" else None, find_unused_parameters=True
            )
        if config.compile:
            self.step_model = torch.compile(self.step_model)
        self.epoch, self.batch, self.step, self.seconds = 0, 0, 0, 0.0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []

    def fit(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Train to the end (from ``state`` on) and return the summary.

        Raises:
            TrainingError: the loss is not finite.
        """
        if state is not None:
            self._restore(state)
        samples = len(self.loader.beton)
        total = samples * self.config.epochs
        done = min(total, samples * self.epoch + self.batch * self.config.batch_size * self.world.size)
        with (
            stop_request() as stop,
            progress_bar(total, "training", initial=done, enabled=self.world.is_first) as bar,
        ):
            while self.epoch < self.config.epochs:
                self._run_epoch(bar, stop)
        return self._finish()

    def _run_epoch(self, bar: Any, stop: StopRequest) -> None:
        self.model.train()
        bar.set_description(f"epoch {self.epoch + 1}/{self.config.epochs}")
        started = saved = time.perf_counter()
        waited = 0.0
        batches = self.loader.epoch(self.epoch, start_batch=self.batch, **self.plan(self.epoch))
        before = time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - before
            parts = self._take_step(batch)
            for name, value in parts.items():
                self.sums[name] = self.sums.get(name, 0.0) + value * len(batch.sample_ids)
            self.sums["samples"] = self.sums.get("samples", 0.0) + len(batch.sample_ids)
            self.batch += 1
            bar.update(len(batch.sample_ids) * self.world.size)
            bar.set_postfix(loss=f"{self.sums['loss'] / self.sums['samples']:.3f}", refresh=False)
            now = time.perf_counter()
            if stop.asked is not None or now - saved > SAVE_SECONDS:
                self.seconds += now - started
                started = saved = now
                self._save_state()
                stop.raise_if_asked()
            before = time.perf_counter()
        self.seconds += time.perf_counter() - started
        self._end_epoch(bar, waited)
        stop.raise_if_asked()

    def _take_step(self, batch: Batch) -> dict[str, float]:
        random = StepRandom.of(self.config.seed, self.world.rank, self.step)
        # Dropout and drop path inside the model read torch's own generator: pinned to the step, too.
        torch.manual_seed(random.torch.initial_seed())
        self.schedule.step_update(self.step)
        parts = self.loss(self.step_model, batch, random)
        values = {name: float(value.detach()) for name, value in parts.items()}
        if not np.isfinite(values["loss"]):
            self._stop_on_loss(batch, values)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(parts["loss"]).backward()
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.step)
        return values

    def _stop_on_loss(self, batch: Batch, values: dict[str, float]) -> None:
        evidence = {
            "epoch": self.epoch,
            "step": self.step,
            "parts": {name: str(value) for name, value in values.items()},
            "sample_ids": batch.sample_ids.tolist(),
            "keys": [self.loader.beton.keys[sample] for sample in batch.sample_ids.tolist()],
        }
        path = self.folder.write_evidence("not-finite.json", evidence)
        raise TrainingError(
            f"the loss is {values['loss']} at epoch {self.epoch + 1}, step {self.step}; the batch's samples are in "
            f"{path}. A smaller --lr, a longer --warmup-epochs or --clip-grad 1 often helps"
        )

    def _end_epoch(self, bar: Any, waited: float) -> None:
        names = sorted(self.sums)
        totals = torch.tensor([self.sums[name] for name in names], dtype=torch.float64)
        sums = dict(zip(names, sum_over_world(totals.to(self._reduce_device()), self.world).tolist(), strict=True))
        samples = sums.pop("samples")
        entry: dict[str, Any] = {"epoch": self.epoch + 1, "step": self.step, "lr": self.optimizer.param_groups[0]["lr"]}
        entry |= {name: value / samples for name, value in sums.items()}
        entry |= {"seconds": self.seconds, "pictures_per_second": samples / self.seconds, "data_wait_seconds": waited}
        if self.validation is not None:
            scores = self.validation(self.best_model())
            entry |= {"top1": scores.top1, "top5": scores.top5, "token_top1": scores.token_top1}
            bar.set_postfix(loss=f"{entry['loss']:.3f}", top1=f"{scores.top1:.1%}")
        self.history.append(entry)
        self.epoch, self.batch, self.seconds, self.sums = self.epoch + 1, 0, 0.0, {}
        if self.world.is_first:
            # The state comes last: a run that dies in between repeats the end of this epoch, and loses nothing.
            save_model(self.folder.path / WEIGHTS_NAME, self.best_model().state_dict(), self.description)
            self.folder.write_log(self.history)
        self._save_state()

    def best_model(self) -> nn.Module:
        """The averaged model where averaging is on, else the model itself."""
        return self.model if self.average is None else self.average.module

    def _reduce_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def _save_state(self) -> None:
        if self.world.is_first:
            self.folder.save_state(
                {
                    "epoch": self.epoch,
                    "batch": self.batch,
                    "step": self.step,
                    "seconds": self.seconds,
                    "sums": self.sums,
                    "history": self.history,
                    "model": unwrap_model(self.model).state_dict(),
                    "average": None if self.average is None else self.average.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                }
            )
        wait_for_world(self.world)

    def _restore(self, state: dict[str, Any]) -> None:
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.seconds, self.sums, self.history = state["seconds"], state["sums"], state["history"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        summary = {
            "epochs": self.epoch,
            "steps": self.step,
            "train_seconds": sum(entry["seconds"] for entry in self.history),
            "loss": last["loss"],
        }
        if self.validation is not None:
            summary |= {name: last[name] for name in ("top1", "top5", "token_top1")}
            if self.average is not None:
                summary["top1_not_averaged"] = self.validation(self.model).top1
        if self.world.is_first:
            self.folder.finish(summary)
        wait_for_world(self.world)
        return summary


@dataclass
class Validation:
    """Scores a model on the validation pictures."""

    loader: TokenLoader
    views: np.ndarray
    class_map: np.ndarray
    amp: torch.dtype | None
    world: World

    def __call__(self, model: nn.Module) -> Scores:
        return evaluate_model(model, self.loader, self.views, self.class_map, self.amp, self.world)
