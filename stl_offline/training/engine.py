"""The loop that all training shares: batches in, weights out, resumable to the sample.

Every step's randomness comes from (seed, step), every view from (seed, epoch, sample), the order from (seed, epoch).
So a run that continues from a stored state takes the steps that it would have taken.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from stl_offline.distributed import failure_of_another, long_barrier, sum_over_world_blocking
from stl_offline.errors import FormatError, TrainingError
from stl_offline.loader import TokenLabels
from stl_offline.progress import progress_bar
from stl_offline.training.interrupt import StopRequest, stop_request
from stl_offline.training.optimization import NotFiniteError, StepResult, TrainStep
from stl_offline.training.run_folder import STATE_NAME, Clock, Progress, RunFolder, check_same_place, check_same_run
from stl_offline.training.setup import Stage, TrainingRun, make_run_folder, make_train_loader, make_validation
from stl_offline.training.steps import Inputs, Objective
from stl_offline.training.watch import Means, RunWatch

# What an epoch shows: epoch → arguments of the loader's `epoch` (views, and which stored map to read).
EpochPlan = Callable[[int], dict[str, Any]]


class TrainLoader(Protocol):
    """What the loop takes batches from. keys: every sample's, by sample id; len: batches of an epoch."""

    batch_size: int

    @property
    def keys(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, *, start_batch: int = 0, **plan: Any) -> Iterable[Any]:
        """The batches of an epoch; each has ``sample_ids`` (B,)."""
        ...


class Scorer(Protocol):
    """Scores a model by ``names``, the first of which decides which weights are the best."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def __call__(self, model: nn.Module, after_batch: Callable[[], None]) -> dict[str, float | None]: ...


def run_stage(
    stage: Stage,
    objective: Objective,
    plan: EpochPlan,
    label_identity: dict[str, Any] | None = None,
    loader_labels: TokenLabels | None = None,
) -> dict[str, Any]:
    """Train, or continue a run, or find that it is complete; gives the summary.

    Args:
        objective: the stage's inputs and losses; plan: what each epoch shows.
        label_identity: what the token labels are, by content; None for a stage without any.
        loader_labels: what the loader makes token targets from, where a plan brings no others.
    """
    folder = make_run_folder(stage, label_identity)
    made = functools.lru_cache(maxsize=1)(plan)

    def plan_once(epoch: int) -> dict[str, Any]:
        """Epochs that are shown together have one plan."""
        return made(stage.config.shown_together(epoch).start)

    return run_training(
        stage, folder, objective, plan_once, lambda: (make_train_loader(stage, loader_labels), make_validation(stage))
    )


def run_training(
    run: TrainingRun,
    folder: RunFolder,
    objective: Objective,
    plan: EpochPlan,
    open_data: Callable[[], tuple[TrainLoader, Scorer | None]],
) -> dict[str, Any]:
    """Train, or continue a run, or find that it is complete; gives the summary.

    Args:
        folder: where the run is kept; objective: inputs and losses; plan: what each epoch shows.
        open_data: gives the loader of the training data, and what scores a model. Not called for a complete run.
    """
    config, world = run.config, run.world
    complete = folder.summary() if config.resume else None
    if complete is not None:
        return complete | {"already_complete": True}
    loader, validation = open_data()
    with folder.held() if world.is_first else contextlib.nullcontext(), failure_of_another(world):
        long_barrier(world)
        check_same_run(folder, config, run.device, world)
        state = folder.open(resume=config.resume, write=world.is_first)
        trainer = Trainer(run, folder, loader, objective, plan, validation)
        if state is not None:
            trainer.restore(state)
        del state  # as large as the model, its average and the optimiser
        return trainer.fit()


@dataclass(frozen=True)
class _Taken:
    """A step whose numbers are not read yet: where the run is after it, its learning rate, the samples of its batch."""

    result: StepResult
    at: Progress
    lr: float
    sample_ids: Tensor


class Trainer:
    """One training run. A step's numbers are read once the next step is started, so that a GPU is never idle meanwhile;
    all are read before anything is stored.

    Args:
        run: the model, its settings, device and processes.
        folder: where the run is kept.
        loader: gives batches of ``accumulate · batch_size``.
        objective: inputs and losses.
        plan: what each epoch shows.
        validation: a function that scores a model, or None.
    """

    def __init__(
        self,
        run: TrainingRun,
        folder: RunFolder,
        loader: TrainLoader,
        objective: Objective,
        plan: EpochPlan,
        validation: Scorer | None,
    ) -> None:
        self.config, self.description, self.device, self.world = run.config, run.description, run.device, run.world
        self.folder, self.loader, self.plan, self.validation = folder, loader, plan, validation
        self.step = TrainStep(run, objective, len(loader))
        self.at = Progress()
        self.means = Means()
        self.history: list[dict[str, Any]] = []
        self.shown: Inputs | None = None
        self._taken: _Taken | None = None
        self.bar: Any = None
        self.watch: RunWatch | None = None

    @property
    def model(self) -> nn.Module:
        return self.step.model

    def fit(self) -> dict[str, Any]:
        """Train to the end (after `restore`, from there on) and return the summary.

        Raises:
            TrainingError: a loss or gradient is not finite, another process of this job has failed, or the processes
                go on from different places.
        """
        check_same_place(self.folder, self.at, self.device, self.world)
        samples = len(self.loader.keys)
        total = samples * self.config.epochs
        done = min(total, samples * self.at.epoch + self.at.batch * self.loader.batch_size * self.world.size)
        with (
            stop_request() as stop,
            RunWatch(self.folder.path, self.config, self.at, enabled=self.world.is_first) as watch,
            progress_bar(total, "training", initial=done, enabled=self.world.is_first) as bar,
        ):
            self.bar, self.watch = bar, watch
            while self.at.epoch < self.config.epochs:
                self._run_epoch(stop)
            return self._finish()

    def _run_epoch(self, stop: StopRequest) -> None:
        self.model.train()
        self.watch.starts_epoch(self.at)
        self.bar.set_description(f"epoch {self.at.epoch + 1}/{self.config.epochs}")
        clock = Clock(self.at)
        saved = time.monotonic()
        plan = self.plan(self.at.epoch)
        # It may have made a token cache: on another machine that can take longer than nccl waits.
        long_barrier(self.world)
        batches = self.loader.epoch(self.at.epoch, start_batch=self.at.batch, **plan)
        for batch in batches:
            clock.works()
            planned = self._is_planned()
            late = self.world.is_first and time.monotonic() - saved > self.config.checkpoint_every
            asked = functools.partial(_asked, stop, late)
            taken = self._take_step(batch, asked)
            notes = self._read_step()
            self._taken = taken
            if self.world.size == 1:  # what other processes ask for comes with the numbers, a step later
                notes = asked()
            clock.tick()
            if planned or any(notes):
                notes = [max(pair) for pair in zip(notes, self._read_step(), strict=True)]
                self._save_state()
                saved = time.monotonic()
                _stop_where_asked(stop, notes)
            clock.waits()
        notes = self._read_step()
        clock.tick()
        if any(notes[: len(StopRequest.SIGNALS)]):  # before measuring, which may take long
            self._save_state()
            _stop_where_asked(stop, notes)
        self._end_epoch(stop)
        self._stop_if_asked(stop)

    def _stop_if_asked(self, stop: StopRequest) -> None:
        """End the program where any process of the job was asked to."""
        asked = torch.tensor(_asked(stop), dtype=torch.float64, device=self.device)
        _stop_where_asked(stop, sum_over_world_blocking(asked, self.world).tolist())

    def _is_planned(self) -> bool:
        """Whether all processes store the state after the next step."""
        steps = self.config.checkpoint_steps
        return bool(steps) and (self.at.step + 1) % steps == 0

    def _take_step(self, batch: Any, notes: Callable[[], list[float]]) -> _Taken:
        """Start one optimiser step."""
        result = self.step(batch, self.at.step, notes)
        self.at.step += 1
        self.at.batch += 1
        inputs, result.inputs = result.inputs, None  # a batch must not lie on the device through the next step
        if inputs is not None and self.config.tensorboard and self.world.is_first and self.at.batch == len(self.loader):
            self.shown = inputs.first(RunWatch.IMAGES)
        return _Taken(result, dataclasses.replace(self.at), self.step.lr, batch.sample_ids)

    def _read_step(self) -> list[float]:
        """Read the numbers of the step taken before, if they are not read yet; gives its notes.

        Raises:
            TrainingError: they are not finite; what led to them is kept in the run's folder.
        """
        taken, self._taken = self._taken, None
        if taken is None:
            return [0.0] * (len(StopRequest.SIGNALS) + 1)
        try:
            numbers = taken.result.numbers()
        except NotFiniteError as error:
            raise self._failure(taken, error) from None
        self.means.add(numbers.values, numbers.images)
        self.bar.update(numbers.images)
        self.bar.set_postfix(loss=f"{self.means.all()['loss']:.3f}", refresh=False)
        self.watch.step(taken.at, taken.lr, numbers.values, numbers.images)
        return numbers.notes

    def _failure(self, taken: _Taken, error: NotFiniteError) -> TrainingError:
        where = f"epoch {taken.at.epoch + 1}, step {taken.at.step}"
        if not error.in_this_process:
            return TrainingError(f"the loss of another process of this job is not finite at {where}")
        samples = taken.sample_ids.tolist()
        evidence = {
            "epoch": taken.at.epoch + 1,
            "step": taken.at.step,
            "rank": self.world.rank,
            "parts": {name: str(value) for name, value in error.losses.items()},
            "sample_ids": samples,
            "keys": [self.loader.keys[sample] for sample in samples],
        }
        name = "not-finite.json" if self.world.size == 1 else f"not-finite-rank{self.world.rank}.json"
        path = self.folder.write_evidence(name, evidence)
        return TrainingError(
            f"the {error} at {where}; the batch's sample ids and keys are in {path}. Start a new run, with "
            "another `out`: a smaller `lr`, a longer `warmup_epochs` or `clip_grad=1` often helps"
        )

    def _end_epoch(self, stop: StopRequest) -> None:
        at = self.at
        entry: dict[str, Any] = {"epoch": at.epoch + 1, "step": at.step, "lr": self.step.lr}
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
            main = self.validation.names[0]
            self.bar.set_postfix(loss=f"{entry['loss']:.3f}", **{main: f"{entry[main]:.1%}"})
        self.history.append(entry)
        self.watch.epoch(entry, self._image_rows if self.shown is not None else None)
        self.at = Progress(epoch=at.epoch + 1, step=at.step, best_score=at.best_score)
        self.means = Means()
        if self.world.is_first:
            # The state comes last: a run that dies in between repeats the end of this epoch, and loses nothing.
            self.folder.save_weights(self.step.averaged_model(), self.description)
            if best is not None:
                self.folder.save_weights(best, self.description, best=True)
            self.folder.write_log(self.history)
        self._save_state()

    def _image_rows(self) -> dict[str, Tensor]:
        return self.step.objective.image_rows(self.model, self.shown)

    def _measure(self, stop: StopRequest) -> tuple[dict[str, Any], nn.Module | None]:
        """Scores of the averaged model, and of the plain one beside it; and whichever is the best so far, if any.

        Alone, a process stops between two batches where it is asked to; several have to end the measuring together.
        """
        after_batch = stop.raise_if_asked if self.world.size == 1 else lambda: None
        main = self.validation.names[0]
        models = {"": self.step.averaged_model()} | ({"model_": self.model} if self.step.average is not None else {})
        entry: dict[str, Any] = {}
        best = None
        for prefix, model in models.items():
            scores = self.validation(model, after_batch)
            entry |= {f"{prefix}{name}": value for name, value in scores.items()}
            if scores[main] > self.at.best_score:
                self.at.best_score, best = scores[main], model
        return entry | {f"best_{main}": self.at.best_score}, best

    def _average_statistics(self) -> None:
        """One set of batch norms' means and variances: all processes measure the model that the first one saves.

        They are the first process's, which the stored state has, so a run that continues from one has the same.
        DistributedDataParallel copies them before each step, so that the others' differ by one step's. It does not
        handle the averaged model.
        """
        if self.world.size > 1:
            for model in (self.model, self.step.average):
                if model is not None:
                    distribute_bn(model, self.world.size, reduce=False)

    def _save_state(self) -> None:
        self._read_step()
        if self.world.is_first:
            own = {"at": vars(self.at), "means": self.means.state(), "history": self.history}
            self.folder.save_state(own | self.step.state())
        long_barrier(self.world)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a stored state.

        Raises:
            FormatError: it holds something else than this run's.
        """
        try:
            self.at, self.history = Progress.of(state["at"]), list(map(dict, state["history"]))
            self.means = Means.of(state["means"])
            self.step.restore(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise FormatError(
                f"{self.folder.path / STATE_NAME} is damaged, it holds no state of this run ({type(error).__name__}: "
                f"{reason}); start anew with `resume=False`"
            ) from error

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
            main = self.validation.names[0]
            summary |= {name: last[name] for name in (*self.validation.names, f"best_{main}")}
            if self.step.average is not None:
                summary[f"{main}_not_averaged"] = last[f"model_{main}"]
        if self.world.is_first:
            self.folder.finish(summary)
        long_barrier(self.world)
        return summary


def _stop_where_asked(stop: StopRequest, notes: Sequence[float]) -> None:
    """End the program where any process was asked to, maybe another one; notes: sums of what `_asked` gives."""
    # By the notes alone, which all processes share: one that was asked since then ends with the others, a step later.
    if any(notes[: len(stop.SIGNALS)]):
        stop.ask(sigint=bool(notes[0]), sigterm=bool(notes[1]))
        stop.raise_if_asked()


def _asked(stop: StopRequest, late: bool = False) -> list[float]:
    """Which of SIGINT and SIGTERM this process has received, and whether it would store the state, as numbers to sum
    over all processes."""
    return [*(float(stop.asked == number) for number in stop.SIGNALS), float(late)]
