"""A run's folder: it describes itself, and the same command continues where it was interrupted.

- ``config.json``: the settings that shape the result, versions, what the data were.
- ``log.jsonl``: one JSON line for each epoch; ``steps.jsonl``: one every few steps.
- ``weights.safetensors``: the averaged weights (the plain ones where averaging is off) after the last whole epoch.
- ``best.safetensors``: those with the best score so far on the validation images, averaged or plain.
- ``state.pt``: all that is needed to resume, with its SHA-256; removed when the run is complete.
- ``summary.json``: the result, written last.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stl_offline.config import RunConfig
from stl_offline.distributed import World, agree
from stl_offline.errors import FormatError, InputError, TargetError, TrainingError
from stl_offline.files import (
    atomic_path,
    atomic_write,
    canonical_json,
    check_writable,
    make_folder,
    read_file,
    read_json_object,
    read_numbers,
    remove_leftovers,
    sha256_bytes,
)
from stl_offline.models import WEIGHTS_NAME, Description, check_digest, save_model
from stl_offline.settings import differences

BEST_NAME = "best.safetensors"
STATE_NAME = "state.pt"
LOCK_NAME = ".lock"
# What a stored state holds.
STATE = {"at", "means", "history", "model", "average", "optimizer", "scaler"}

_DIGEST = "sha256"  # the entry of a stored state with the SHA-256 of the others
_SUMMARY = ("epochs", "steps", "train_seconds", "loss")  # what every summary holds
ADVICE = "choose another `out`, or start anew there with `resume=False`"

_PACKAGES = ("stl-offline", "torch", "torchvision", "timm", "ffcv", "numpy", "numba")


@dataclass
class Progress:
    """Where a run is. ``batch`` steps of epoch ``epoch`` (from 0) are taken, ``step`` of the whole run."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0  # of this epoch so far
    cpu_seconds: float = 0.0
    waited: float = 0.0  # for batches
    best_score: float = -1.0  # of the score that decides, such as top-1

    @classmethod
    def of(cls, values: dict[str, int | float]) -> "Progress":
        """Progress from its stored values; raises TypeError or ValueError for what none has."""
        # States of earlier releases have the name of the one score that there was.
        at = cls(**{"best_score" if name == "best_top1" else name: value for name, value in values.items()})
        for name in ("epoch", "batch", "step"):
            if type(getattr(at, name)) is not int or getattr(at, name) < 0:
                raise ValueError(f"{name} must be an integer from 0 on, got {getattr(at, name)!r}")
        for name in ("seconds", "cpu_seconds", "waited", "best_score"):
            if type(getattr(at, name)) not in (int, float):
                raise TypeError(f"{name} must be a number, got {getattr(at, name)!r}")
        return at


class Clock:
    """Adds wall-clock, processor and waiting time to a run's progress."""

    def __init__(self, at: Progress) -> None:
        self.at = at
        self.wall = self.waiting = time.perf_counter()
        self.cpu = time.process_time()

    def tick(self) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        self.at.seconds += wall - self.wall
        self.at.cpu_seconds += cpu - self.cpu
        self.wall, self.cpu = wall, cpu

    def waits(self) -> None:
        self.waiting = time.perf_counter()

    def works(self) -> None:
        self.at.waited += time.perf_counter() - self.waiting


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a run."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


class RunFolder:
    """The files of one training run.

    Args:
        path: the folder; made if missing.
        stage: what is trained, such as "labeler" or "student".
        settings: what shapes the result; a folder of other settings is refused.
        data: fingerprints of images and labels; refused likewise.

    Raises:
        InputError: the folder holds something else, or a run with other settings.
    """

    def __init__(self, path: str | Path, stage: str, settings: dict[str, Any], data: dict[str, Any]) -> None:
        self.path = Path(path)
        self._config = {"stage": stage, "settings": settings, "data": data, "versions": versions()}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other jobs out of the folder; the kernel frees it however this process ends.

        Raises:
            InputError: another job is training there (on another machine it may not be seen), or it holds no run.
        """
        self._check_own()
        make_folder(self.path)
        with open(self.path / LOCK_NAME, "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"another job is training in {self.path}; wait for it, stop it, or choose another `out`"
                ) from error
            except OSError:  # a file system without locks
                pass
            yield

    def look(self, resume: bool) -> None:
        """Check that a run of these settings may begin or be resumed here, before its data are known.

        Raises:
            InputError: as `held` and `open`.
            TargetError: the folder cannot be written.
        """
        self._check_own()
        check_writable(self.path)
        if resume and (self.path / "config.json").is_file():
            self._check_same(self.path / "config.json", ("settings",))

    @property
    def digest(self) -> int:
        """48 bits that differ where settings, images or labels do."""
        shaped = {name: value for name, value in self._config.items() if name != "versions"}
        return int(sha256_bytes(canonical_json(shaped))[:12], 16)

    def open(self, *, resume: bool, write: bool) -> dict[str, Any] | None:
        """Check the folder or begin a run in it; give back the stored state to go on from, or None for a new start."""
        config_path = self.path / "config.json"
        if config_path.is_file() and resume:
            self._check_same(config_path)
            if write:
                if (self.path / "summary.json").exists():  # it was not there before the folder was held
                    raise InputError(f"another job has just finished the run in {self.path}; run the command again")
                remove_leftovers(self.path)
            return self._load_state()
        if not write:
            return None
        for name in ("summary.json", STATE_NAME, "log.jsonl", "steps.jsonl", WEIGHTS_NAME, BEST_NAME):
            (self.path / name).unlink(missing_ok=True)
        for path in [*self.path.glob("tensorboard/events.*"), *self.path.glob("not-finite*.json")]:
            path.unlink()
        atomic_write(config_path, canonical_json(self._config))
        return None

    def summary(self) -> dict[str, Any] | None:
        """The result of a complete run of these settings, or None."""
        path = self.path / "summary.json"
        if not path.is_file() or not (self.path / "config.json").is_file():
            return None
        self._check_same(self.path / "config.json")
        summary = read_numbers(path, ADVICE)
        if lacking := [name for name in _SUMMARY if summary.get(name) is None]:
            raise FormatError(f"{path} is damaged ({', '.join(lacking)} missing); {ADVICE}")
        if not (self.path / WEIGHTS_NAME).is_file():
            raise FormatError(f"{self.path} holds a complete run, but not its {WEIGHTS_NAME}; {ADVICE}")
        for name in (WEIGHTS_NAME, BEST_NAME):
            if (self.path / name).is_file():
                check_digest(self.path / name)
        return summary

    def save_state(self, state: dict[str, Any]) -> None:
        """Write all that is needed to go on and its SHA-256, whole or not at all."""
        self._check_there()
        state = state | {_DIGEST: content_digest(state)}
        with atomic_path(self.path / STATE_NAME) as temporary, open(temporary, "wb") as stream:
            try:
                torch.save(state, stream)
            except RuntimeError as error:
                # torch hides the system's error of a write, such as a full disk.
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def save_weights(self, model: nn.Module, description: Description, *, best: bool = False) -> None:
        """Write a model's weights as the last ones, or as the best."""
        self._check_there()
        save_model(self.path / (BEST_NAME if best else WEIGHTS_NAME), model.state_dict(), description)

    def write_log(self, history: list[dict[str, Any]]) -> None:
        """One JSON line for each epoch so far. The file is rewritten whole, so a resumed run repeats no line."""
        self._check_there()
        lines = "".join(json.dumps(entry, sort_keys=True) + "\n" for entry in history)
        atomic_write(self.path / "log.jsonl", lines.encode())

    def write_evidence(self, name: str, content: dict[str, Any]) -> Path:
        """Keep what led to a failed run, as JSON; gives back its path."""
        atomic_write(self.path / name, canonical_json(content))
        return self.path / name

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run complete."""
        self._check_there()
        atomic_write(self.path / "summary.json", canonical_json(summary))
        (self.path / STATE_NAME).unlink(missing_ok=True)

    def _check_there(self) -> None:
        # A folder that was moved would be made anew, with files that belong to no run.
        if not (self.path / "config.json").is_file():
            raise TargetError(
                f"{self.path} was moved or removed during the run; put it back, or give its new place as `out`, and "
                "run the same command again"
            )

    def _check_own(self) -> None:
        if self.path.is_dir() and not _may_be_ours(self.path / "config.json"):
            foreign = [path for path in self.path.iterdir() if not path.name.startswith(".")]
            if foreign:
                raise InputError(f"{self.path} is not empty and holds no run; choose another `out`")

    def _check_same(self, config_path: Path, parts: tuple[str, ...] = ("settings", "data")) -> None:
        stored = read_json_object(config_path, ADVICE)
        for part in ("settings", "data"):
            if not isinstance(stored.get(part), dict):
                raise FormatError(f"{config_path} is damaged ({part} is no JSON object); {ADVICE}")
        changed = []
        for part in parts:
            changed += differences(stored[part], json.loads(canonical_json(self._config[part])))
        if stored.get("stage") != self._config["stage"]:
            changed.insert(0, f"stage: {stored.get('stage')!r} → {self._config['stage']!r}")
        if changed:
            raise InputError(f"{self.path} holds a run with other settings ({'; '.join(changed[:4])}); {ADVICE}")

    def _load_state(self) -> dict[str, Any] | None:
        path = self.path / STATE_NAME
        if not path.is_file():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except MemoryError:  # not the file's fault: deleting it would not help
            raise
        except OSError as error:  # likewise, but for a damaged place within the file, which no stream can seek
            if error.errno != errno.EINVAL:
                raise
            reason = f"{type(error).__name__}: {error}"
        except Exception as error:  # damaged bytes make torch's unpickler raise anything
            reason = f"{type(error).__name__}: {error}"
        else:
            if not isinstance(state, dict):
                reason = f"it holds {type(state).__name__}"
            elif missing := STATE - state.keys():
                reason = f"{', '.join(sorted(missing))} missing"
            else:
                stored = state.pop(_DIGEST, None)  # releases before this one stored none
                if stored is None or stored == content_digest(state):
                    return state
                reason = "its content does not have the SHA-256 that was stored with it"
        raise FormatError(f"{path} is damaged ({' '.join(reason.split())[:300]}); start anew with `resume=False`")


def content_digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists and tuples of tensors and plain values."""
    digest = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            digest.update(f"tensor {part.dtype} {tuple(part.shape)}\n".encode())
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        elif isinstance(part, dict):
            digest.update(f"dict {len(part)}\n".encode())
            for name, each in part.items():
                add(name)
                add(each)
        elif isinstance(part, list | tuple):
            digest.update(f"{type(part).__name__} {len(part)}\n".encode())
            for each in part:
                add(each)
        else:
            digest.update(f"{part!r}\n".encode())

    add(value)
    return digest.hexdigest()


def _may_be_ours(config: Path) -> bool:
    """Whether this is a run's config.json, or was: other programs' files have the same name."""
    if not config.is_file():
        return False
    try:
        stored = json.loads(read_file(config))
    except (ValueError, RecursionError):
        return True
    return not isinstance(stored, dict) or not stored.keys().isdisjoint(("stage", "settings", "data"))


def check_same_run(folder: RunFolder, config: RunConfig, device: torch.device, world: World) -> None:
    """Every process has the same settings and data: a machine may hold other images under the same path.

    Raises:
        TrainingError: they differ; in every process.
    """
    # When they measure shapes no result, but they have to do it together.
    if not _same([folder.digest, config.val_every], device, world):
        raise TrainingError(
            "the processes of this job have other settings, images or labels than each other; give all of them the "
            "same command, and the same files where it names them"
        )


def check_same_place(folder: RunFolder, at: Progress, device: torch.device, world: World) -> None:
    """Every process goes on from the same place: one that does not see the run's folder would start anew.

    Raises:
        TrainingError: they differ; in every process.
    """
    if not _same([at.epoch, at.batch, at.step], device, world):
        raise TrainingError(
            f"the processes of this job find different states in {folder.path} (this one: step {at.step}); "
            "give a folder that all of them share"
        )


def _same(values: list[int], device: torch.device, world: World) -> bool:
    return agree(torch.tensor(values, dtype=torch.float64, device=device), world)
