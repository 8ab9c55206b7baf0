"""The loop that both stages share: batches in, weights out, resumable to the sample.

Every step's randomness comes from (seed, step), every view from (seed, epoch, sample), the order from (seed, epoch).
So a run that goes on from a stored state takes the steps that it would have taken.

A step's images come in one batch of ``accumulate · batch_size``, are augmented and mixed as one, and go through the
model in ``accumulate`` parts. Each part's loss counts by its share of the whole step (`stl_offline.training.steps`),
over all processes, so that neither parts nor processes change what is minimised.
"""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stl_offline.config import TrainConfig
from stl_offline.distributed import World, add_up, wait_for_world
from stl_offline.errors import TrainingError
from stl_offline.evaluation import Validation
from stl_offline.loader import Batch, TokenLoader
from stl_offline.models import ModelDescription
from stl_offline.progress import progress_bar
from stl_offline.training.interrupt import StopRequest, stop_request
from stl_offline.training.optimization import learning_rate, make_average, make_optimizer, make_schedule
from stl_offline.training.run_folder import Clock, Progress, RunFolder, check_same_place
from stl_offline.training.steps import Objective, Share, StepInputs, StepRandom
from stl_offline.training.sync_norm import share_statistics
from stl_offline.training.watch import Means, RunWatch

# What an epoch shows: epoch → arguments of TokenLoader.epoch (views, and which stored map to read).
EpochPlan = Callable[[int], dict[str, Any]]

# What the processes tell each other in every step beside the losses.
_FLAGS = ("not finite", "SIGINT", "SIGTERM", "save")


class Trainer:
    """One training run.

    Args:
        model: what is trained.
        loader: gives batches of ``accumulate · batch_size``.
        objective: the stage's inputs and losses.
        plan: what each epoch shows.
        validation: a function that scores a model, or None.
        amp: the autocast type that the objective uses.
        unused_parameters: whether the losses leave parameters, those of the token head, without a gradient.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        model: nn.Module,
        loader: TokenLoader,
        objective: Objective,
        plan: EpochPlan,
        validation: Validation | None,
        description: ModelDescription,
        device: torch.device,
        world: World,
        amp: torch.dtype | None = None,
        unused_parameters: bool = False,
    ) -> None:
        self.config, self.folder, self.loader, self.objective, self.plan = config, folder, loader, objective, plan
        self.validation, self.description, self.device, self.world = validation, description, device, world
        self.model = model.to(device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        if config.sync_bn and world.size > 1:
            share_statistics(self.model)
        self.optimizer = make_optimizer(self.model, config, learning_rate(config, world.size))
        self.schedule = make_schedule(self.optimizer, config, len(loader))
        self.average = make_average(self.model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp is torch.float16)
        self.unused_parameters = unused_parameters
        self.parallel: DistributedDataParallel | None = None
        if world.size > 1:
            self.parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                find_unused_parameters=unused_parameters,
                gradient_as_bucket_view=True,
            )
        self.step_model: nn.Module = self.parallel or self.model
        if config.compile:
            # Of its own for every batch size: which sizes came before must not shape what comes after a new start.
            self.step_model = torch.compile(self.step_model, dynamic=False)
        self.at = Progress()
        self.means = Means()
        self.history: list[dict[str, Any]] = []
        self.shown: StepInputs | None = None

    def fit(self) -> dict[str, Any]:
        """Train to the end (after `restore`, from there on) and return the summary.

        Raises:
            TrainingError: a loss or gradient is not finite, another process of this job has failed, or the processes
                go on from different places.
        """
        check_same_place(self.folder, self.at, self.device, self.world)
        samples = len(self.loader.beton)
        total = samples * self.config.epochs
        done = min(total, samples * self.at.epoch + self.at.batch * self.loader.batch_size * self.world.size)
        with (
            stop_request() as stop,
            RunWatch(self.folder.path, self.config, self.at, enabled=self.world.is_first) as watch,
            progress_bar(total, "training", initial=done, enabled=self.world.is_first) as bar,
        ):
            while self.at.epoch < self.config.epochs:
                self._run_epoch(bar, stop, watch)
            return self._finish()

    def _run_epoch(self, bar: Any, stop: StopRequest, watch: RunWatch) -> None:
        self.model.train()
        watch.starts_epoch(self.at)
        bar.set_description(f"epoch {self.at.epoch + 1}/{self.config.epochs}")
        clock = Clock(self.at)
        saved = time.monotonic()
        batches = self.loader.epoch(self.at.epoch, start_batch=self.at.batch, **self.plan(self.at.epoch))
        clock.waits()
        for batch in batches:
            clock.works()
            due = self._is_due(time.monotonic() - saved)
            values, flags = self._take_step(batch, stop, due)
            images = int(values.pop("images"))
            self.means.add(values, images)
            self.at.batch += 1
            bar.update(images)
            bar.set_postfix(loss=f"{self.means.all()['loss']:.3f}", refresh=False)
            clock.tick()
            watch.step(self.at, self.optimizer.param_groups[0]["lr"], values, images)
            if flags["SIGINT"] or flags["SIGTERM"] or flags["save"]:
                self._save_state()
                saved = time.monotonic()
                # Another process may have been asked, and not this one.
                stop.ask(sigint=bool(flags["SIGINT"]), sigterm=bool(flags["SIGTERM"]))
                stop.raise_if_asked()
            clock.waits()
        clock.tick()
        self._end_epoch(bar, stop, watch)
        self._stop_if_asked(stop)

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """End the program where any process of the job was asked to."""
        asked = [float(stop.asked == number) for number in stop.SIGNALS]
        told = add_up(torch.tensor(asked, dtype=torch.float64, device=self.device), self.world).tolist()
        stop.ask(sigint=bool(told[0]), sigterm=bool(told[1]))
        stop.raise_if_asked()

    def _is_due(self, seconds: float) -> bool:
        """Whether this process would store the state after the next step."""
        steps = self.config.checkpoint_steps
        if steps and (self.at.step + 1) % steps == 0:
            return True
        return self.world.is_first and seconds > self.config.checkpoint_every

    def _take_step(self, batch: Batch, stop: StopRequest, due: bool) -> tuple[dict[str, float], dict[str, float]]:
        """One optimiser step; gives the step's means over all processes, and what they told each other."""
        random = StepRandom.of(self.config.seed, self.world.rank, self.at.step)
        # Dropout and drop path inside the model read torch's own generator: pinned to the step, too.
        torch.manual_seed(random.torch.initial_seed())
        self.schedule.step_update(self.at.step)
        inputs = self.objective.inputs(batch, random)
        totals = add_up(inputs.totals(), self.world)
        self.optimizer.zero_grad(set_to_none=True)
        losses = self._backward(inputs, totals)
        asked = [float(stop.asked == number) for number in stop.SIGNALS]
        told = torch.stack([*losses.values(), (~torch.isfinite(losses["loss"])).double()])
        told = torch.cat([told, torch.tensor([*asked, float(due)], dtype=torch.float64, device=self.device)])
        numbers = add_up(told, self.world).tolist()
        values = {name: number / self.world.size for name, number in zip(losses, numbers, strict=False)}
        flags = dict(zip(_FLAGS, numbers[len(losses) :], strict=True))
        if flags["not finite"]:
            if torch.isfinite(losses["loss"]):
                raise TrainingError(f"the loss of another process of this job is not finite at {self._where()}")
            self._stop(batch, losses, f"loss is {values['loss']}")
        self.scaler.unscale_(self.optimizer)
        # The same in all processes, whose gradients are means over all of them.
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad or math.inf)
        values["gradient_norm"] = float(norm)
        if not (math.isfinite(values["gradient_norm"]) or self._may_shrink()):
            self._stop(batch, losses, f"gradient's norm is {values['gradient_norm']}")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.at.step += 1
        if self.average is not None:
            self.average.update(self.model, step=self.at.step)
        if self.config.tensorboard and self.world.is_first and self.at.batch + 1 == len(self.loader):
            self.shown = inputs.first(RunWatch.IMAGES)
        return values | {"images": float(totals[0])}, flags

    def _backward(self, inputs: StepInputs, totals: Tensor) -> dict[str, Tensor]:
        """Gradients of a whole step, part by part; gives this process's sums of the losses, (,) float64 each."""
        # As many parts in every process: batches may differ by one image.
        count = self.config.accumulate
        if count > 1:
            count = min(count, int(totals[0]) // self.world.size)
        sums: dict[str, Tensor] = {}
        for number, part in enumerate(inputs.parts(count), 1):
            alone = self.parallel is not None and number < count
            with self.parallel.no_sync() if alone else contextlib.nullcontext():
                losses = self.objective.losses(self.step_model, part, Share.of(part, totals, self.world.size))
                self.scaler.scale(losses["loss"]).backward()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        return sums

    def _stop(self, batch: Batch, losses: dict[str, Tensor], what: str) -> None:
        """Stop before numbers that are not finite reach the weights, and keep what led to them."""
        parts = {name: float(value) for name, value in losses.items()}
        samples = batch.sample_ids.tolist()
        evidence = {
            "epoch": self.at.epoch + 1,
            "step": self.at.step + 1,
            "rank": self.world.rank,
            "parts": {name: str(value) for name, value in parts.items()},
            "sample_ids": samples,
            "keys": [self.loader.beton.keys[sample] for sample in samples],
        }
        name = "not-finite.json" if self.world.size == 1 else f"not-finite-rank{self.world.rank}.json"
        path = self.folder.write_evidence(name, evidence)
        raise TrainingError(
            f"the {what} at {self._where()}; the batch's sample ids and keys are in {path}. "
            "A smaller --lr, a longer --warmup-epochs or --clip-grad 1 often helps: in a new run, with another --out"
        )

    def _may_shrink(self) -> bool:
        """Whether a smaller loss scale may make the gradient finite. One that is not finite at a scale of 1 is lost."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1

    def _where(self) -> str:
        return f"epoch {self.at.epoch + 1}, step {self.at.step + 1}"

    def _end_epoch(self, bar: Any, stop: StopRequest, watch: RunWatch) -> None:
        at = self.at
        entry: dict[str, Any] = {"epoch": at.epoch + 1, "step": at.step, "lr": self.optimizer.param_groups[0]["lr"]}
        entry |= self.means.all()
        entry |= {"seconds": at.seconds, "images_per_second": self.means.images / max(at.seconds, 1e-9)}
        entry |= {"cpu_seconds": at.cpu_seconds, "data_wait_seconds": at.waited}
        self._average_statistics()
        last = at.epoch + 1 == self.config.epochs
        best: nn.Module | None = None
        if self.validation is not None and (last or (at.epoch + 1) % self.config.val_every == 0):
            self._save_state()  # measuring may take long, and whoever ends the run in it must not lose steps
            scores, best = self._measure(stop)
            entry |= scores
            bar.set_postfix(loss=f"{entry['loss']:.3f}", top1=f"{entry['top1']:.1%}")
        self.history.append(entry)
        watch.epoch(entry, self.model, self.shown)
        self.at = Progress(epoch=at.epoch + 1, step=at.step, best_top1=at.best_top1)
        self.means = Means()
        if self.world.is_first:
            # The state comes last: a run that dies in between repeats the end of this epoch, and loses nothing.
            self.folder.save_weights(self.averaged_model(), self.description)
            if best is not None:
                self.folder.save_weights(best, self.description, best=True)
            self.folder.write_log(self.history)
        self._save_state()

    def _measure(self, stop: StopRequest) -> tuple[dict[str, Any], nn.Module | None]:
        """Scores of the averaged model, and of the plain one beside it; and whichever is the best so far, if any.

        Alone, a process stops between two batches where it is asked to; several have to end the measuring together.
        """
        after_batch = stop.raise_if_asked if self.world.size == 1 else lambda: None
        models = {"": self.averaged_model()} | ({"model_": self.model} if self.average is not None else {})
        entry: dict[str, Any] = {}
        best = None
        for prefix, model in models.items():
            scores = self.validation(model, after_batch)
            entry |= {f"{prefix}{name}": getattr(scores, name) for name in ("top1", "top5", "token_top1")}
            if scores.top1 > self.at.best_top1:
                self.at.best_top1, best = scores.top1, model
        return entry | {"best_top1": self.at.best_top1}, best

    def _average_statistics(self) -> None:
        """One set of batch norms' means and variances: all processes measure the model that the first one saves.

        DistributedDataParallel hands out the first one's before each step, so that the others' differ by one step's; of
        the averaged model it knows nothing.
        """
        if self.world.size > 1:
            for model in (self.model, self.average):
                if model is not None:
                    distribute_bn(model, self.world.size, reduce=True)

    def averaged_model(self) -> nn.Module:
        """The averaged model where averaging is on, else the model itself."""
        return self.model if self.average is None else self.average.module

    def _save_state(self) -> None:
        if self.world.is_first:
            self.folder.save_state(
                {
                    "at": vars(self.at),
                    "means": self.means.state(),
                    "history": self.history,
                    "model": self.model.state_dict(),
                    "average": None if self.average is None else self.average.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                }
            )
        wait_for_world(self.world)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state."""
        self.at, self.history = Progress(**state["at"]), state["history"]
        self.means = Means.of(state["means"])
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def _finish(self) -> dict[str, Any]:
        last = self.history[-1]
        summary = {
            "epochs": self.at.epoch,
            "steps": self.at.step,
            "train_seconds": sum(entry["seconds"] for entry in self.history),
            "train_cpu_seconds": sum(entry["cpu_seconds"] for entry in self.history),
            "loss": last["loss"],
        }
        if self.validation is not None:
            summary |= {name: last[name] for name in ("top1", "top5", "token_top1", "best_top1")}
            if self.average is not None:
                summary["top1_not_averaged"] = last["model_top1"]
        if self.world.is_first:
            self.folder.finish(summary)
        wait_for_world(self.world)
        return summary
