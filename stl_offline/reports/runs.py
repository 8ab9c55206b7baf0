"""The files of a training run, read for its report: finished or not, intact or with damaged log lines.

The files are those of `stl_offline.training.run_folder`; reading them needs no torch.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stl_offline.errors import InputError, printable
from stl_offline.files import first_not_number, read_json_object, read_numbers

FINE_TUNED = ("segmenter", "detector")  # stages whose models predict masks or boxes
_ABSENT = "–"


@dataclass(frozen=True)
class Run:
    """One run.

    name: its folder's name, with as much of the path as distinguishes the runs; stage: "labeler", "student",
    "segmenter" or "detector"; settings, data, versions: of ``config.json``; history: one entry per epoch, in order;
    summary: the result, None if the run is not finished; notes: faults of its files.
    """

    path: Path
    name: str
    stage: str
    settings: dict[str, Any]
    data: dict[str, Any]
    versions: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    summary: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def model(self) -> str:
        """The model's name; that of the backbone for a segmenter or detector."""
        backbone = self.data.get("backbone")
        fallback = backbone.get("model") if isinstance(backbone, dict) else None
        return str(self.settings.get("model") or fallback or "model unknown")

    @property
    def epochs(self) -> int:
        """Epochs set for it; 0 where its settings have none."""
        return int(number(self.settings.get("epochs")) or 0)

    @property
    def status(self) -> str:
        """Finished, or how many epochs of how many."""
        if self.summary is not None:
            return "finished"
        return f"unfinished, {len(self.history)} of {self.epochs} epochs"

    def measured(self, name: str) -> tuple[tuple[float, float | None], ...]:
        """`points` of the epochs that have the entry: some are measured every few epochs only."""
        return tuple((float(entry["epoch"]), number(entry[name])) for entry in self.history if name in entry)

    def points(self, name: str) -> tuple[tuple[float, float | None], ...]:
        """(epoch, value) of one entry of the history; None where an epoch lacks it or it is no finite number."""
        return tuple((float(entry["epoch"]), number(entry.get(name))) for entry in self.history)

    def result(self, name: str) -> float | None:
        """A value of the summary, else of the last epoch that has it."""
        if self.summary is not None and number(self.summary.get(name)) is not None:
            return number(self.summary[name])
        known = [value for _, value in self.points(name) if value is not None]
        return known[-1] if known else None

    def total(self, name: str) -> float:
        """The sum of one entry over all epochs."""
        return sum(value for _, value in self.points(name) if value is not None)


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Read runs.

    Raises:
        InputError: a folder holds no run, or is given twice.
        FormatError: ``config.json`` or ``summary.json`` is not a JSON object.
    """
    places = [Path(path) for path in paths]
    for place in places:
        if not (place / "config.json").is_file():
            what = "is not a folder" if not place.is_dir() else "holds no config.json"
            raise InputError(f"{place} is not a run: it {what}; pass the output folder of a training run")
    if len({place.resolve() for place in places}) < len(places):
        raise InputError("the same run is given twice; pass each run once")
    return [_read_run(place, name) for place, name in zip(places, _names(places), strict=True)]


def setting_rows(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Settings that differ, as (name, each run's value), and those that are the same, as (name, value)."""
    flat = [_flatten(run) for run in runs]
    differ, same = [], []
    for name in sorted(set().union(*flat)):
        values = [_text(run[name]) if name in run else _ABSENT for run in flat]
        if len(set(values)) > 1:
            differ.append((name, values))
        else:
            same.append((name, values[0]))
    return differ, same


_ADVICE = "train again or copy the run again"


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # an integer of hundreds of digits
        return None


def _read_run(place: Path, name: str) -> Run:
    config = read_json_object(place / "config.json", _ADVICE)
    notes: list[str] = []
    history = _read_log(place / "log.jsonl", notes)
    summary = read_numbers(place / "summary.json", _ADVICE) if (place / "summary.json").is_file() else None
    if (place / "not-finite.json").is_file() and summary is None:
        notes.append("the loss was not finite; the batch is recorded in not-finite.json")
    return Run(
        path=place,
        name=name,
        stage=str(config.get("stage", "run")),
        settings=_object(config.get("settings")),
        data=_object(config.get("data")),
        versions=_object(config.get("versions")),
        history=history,
        summary=summary,
        notes=tuple(notes),
    )


def _read_log(path: Path, notes: list[str]) -> tuple[dict[str, Any], ...]:
    """One entry per epoch. Broken lines are skipped and noted; the last entry of an epoch counts."""
    if not path.is_file():
        notes.append("no epoch has finished yet" if path.parent.is_dir() else "it has no log")
        return ()
    entries: dict[int, dict[str, Any]] = {}
    broken = []
    for line_number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if first_not_number(entry) is not None:
                raise ValueError("an entry that is no number")
            float(entry["epoch"])  # an integer of hundreds of digits has no place on an axis
            entries[int(entry["epoch"])] = entry
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            broken.append(line_number)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (", …" if len(broken) > 5 else "")
        notes.append(f"{len(broken)} lines of {path.name} are broken and were skipped (line {lines})")
    return tuple(entries[epoch] for epoch in sorted(entries))


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _names(places: Sequence[Path]) -> list[str]:
    parts = [place.resolve().parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(names):
            break
    return [printable(name) for name in names]


def _flatten(run: Run) -> dict[str, Any]:
    """A run's whole configuration, in one level."""
    flat = {"stage": run.stage} | run.settings
    for name, value in run.data.items():
        if name == "class_names":
            flat["classes"] = len(value) if isinstance(value, list) else value
        elif isinstance(value, dict):
            flat |= {f"{name} {inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[name] = value
    return flat | {f"version of {name}": value for name, value in run.versions.items()}


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:16]}…" if len(text) == 64 and text.isalnum() else text
