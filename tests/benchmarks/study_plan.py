"""What the study consists of: its tasks, what each needs, and how each is done in a process of its own."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from study_corruptions import make_corrupted, measure_corrupted
from study_measures import measure_agreement, measure_boxes

from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.files import atomic_write, canonical_json
from stl_offline.models import load_model
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student

SIDE = 64
MACHINE = {"workers": 1, "device": "cpu"}


@dataclass(frozen=True)
class Study:
    """What the whole study is about; a folder of other settings is refused."""

    train: str
    val: str
    boxes: str | None
    epochs: int
    seeds: int
    batch_size: int
    corrupted_images: int


@dataclass(frozen=True)
class Task:
    """One piece of work: its result lies in ``results/NAME.json`` once it is done."""

    name: str
    kind: str
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


# Label sets: name → dump options. "views" holds as many crops as a run has epochs.
SETS = {
    "whole": {},
    "whole-128": {"img_size": 128},
    "whole-k1": {"top_k": 1},
    "whole-k20": {"top_k": 20},
    "views": {"crops_per_image": "epochs"},
    "views-4": {"crops_per_image": 4},
}
# The arms with every seed: labels and what else differs from the defaults.
MAIN_ARMS = {
    "none": {"labels": "none"},
    "online": {"labels": "online"},
    "whole": {"labels": ("whole",)},
    "views": {"labels": ("views",)},
}
# Those with one seed.
OTHER_ARMS = {
    "zoom": {"labels": ("whole", "whole-128"), "labels_pick": "zoom"},
    "whole-128": {"labels": ("whole-128",)},
    "views-4": {"labels": ("views-4",)},
    "whole-soft": {"labels": ("whole",), "token_target": "soft"},
    "whole-argmax": {"labels": ("whole",), "token_target": "argmax"},
    "whole-uniform": {"labels": ("whole",), "residual": "uniform"},
    "whole-k1": {"labels": ("whole-k1",)},
    "whole-k20": {"labels": ("whole-k20",)},
    "whole-half": {"labels": ("whole",), "token_weight": 0.5},
    "whole-double": {"labels": ("whole",), "token_weight": 2.0},
}
ARMS = MAIN_ARMS | OTHER_ARMS


def make_tasks(study: Study) -> list[Task]:
    """Every task, those first that others wait for."""
    tasks = [Task("corrupted", "corrupted"), Task("labeler", "labeler", ("corrupted",))]
    tasks += [Task(f"labels-{name}", "dump", ("labeler",), options) for name, options in SETS.items()]
    arms = [(name, options, seed) for seed in range(study.seeds) for name, options in MAIN_ARMS.items()]
    # The first seed of everything before the others': a study cut short still has every arm.
    first = arms[: len(MAIN_ARMS)] + [(name, options, 0) for name, options in OTHER_ARMS.items()]
    for name, options, seed in first + arms[len(MAIN_ARMS) :]:
        labels = options["labels"]
        needs = {"none": (), "online": ("labeler",)}.get(labels) if isinstance(labels, str) else None
        needs = tuple(f"labels-{each}" for each in labels) if needs is None else needs
        tasks.append(Task(f"{name}-seed{seed}", "student", ("corrupted", *needs), options | {"seed": seed}))
    tasks += [Task(f"agreement-{name}", "agreement", (f"labels-{name}",), {"sets": (name,)}) for name in SETS]
    zoom = ("whole", "whole-128")
    tasks.append(Task("agreement-zoom", "agreement", tuple(f"labels-{name}" for name in zoom), {"sets": zoom}))
    if study.boxes is not None:
        tasks.append(Task("boxes", "boxes", ("labels-whole", "labels-whole-128")))
    return tasks


def run_task(study: Study, folder: Path, task: Task) -> None:
    """Do one task and keep its result; every part of it goes on where an earlier process was stopped."""
    begun = folder / "begun" / task.name
    goes_on = begun.exists()
    atomic_write(begun, b"")
    started, cpu_started = time.perf_counter(), time.process_time()
    result = _DO[task.kind](study, folder, task)
    seconds = {"wall_seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    # What an earlier process did is not counted here; a run's own log counts all of its steps.
    result |= dict.fromkeys(seconds) if goes_on else seconds
    atomic_write(result_path(folder, task.name), canonical_json(result))


def result_path(folder: Path, name: str) -> Path:
    """Where a task's result lies."""
    return folder / "results" / f"{name}.json"


def read_result(folder: Path, name: str) -> dict[str, Any] | None:
    """A task's result, or None where it is not done."""
    path = result_path(folder, name)
    return json.loads(path.read_text()) if path.is_file() else None


def _corrupted(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    make_corrupted(study.val, folder / "corrupted", SIDE, study.corrupted_images, seed=0)
    return {}


def _labeler(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    run = folder / "runs" / "labeler"
    summary = train_labeler(LabelerConfig(out=str(run), seed=0, **_shared(study)))
    return summary | _scores(folder, run)


def _dump(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    options = {name: study.epochs if value == "epochs" else value for name, value in task.options.items()}
    config = DumpConfig(
        data=study.train,
        labeler=str(folder / "runs" / "labeler"),
        out=str(folder / "labels" / task.name.removeprefix("labels-")),
        shards=4,
        **MACHINE,
        **{"top_k": 5, "seed": 0} | options,
    )
    report = asdict(dump_labels(config))
    return {name: report[name] for name in ("samples", "bytes", "seconds")}


def _student(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    options = dict(task.options)
    labels = options.pop("labels")
    if labels == "online":
        options["labeler"] = str(folder / "runs" / "labeler")
    elif labels != "none":
        labels = tuple(str(folder / "labels" / name) for name in labels)
    run = folder / "runs" / task.name
    shared = _shared(study)
    if options["seed"] > 0 or task.name.removesuffix("-seed0") not in MAIN_ARMS:
        # Curves are looked at for the first seed of the main arms; scoring takes a tenth of a run's time.
        shared["val_every"] = study.epochs
    summary = train_student(StudentConfig(labels=labels, out=str(run), **shared, **options))
    return summary | _scores(folder, run)


def _agreement(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    sets = tuple(str(folder / "labels" / name) for name in task.options["sets"])
    pick = {"labels_pick": "zoom"} if len(sets) > 1 else {}
    options = {"color_jitter": 0.0, "token_target": "soft", "soft_classes": 20, "residual": "uniform"} | pick
    run = {"out": str(folder / "unused"), "seed": 1}
    student = StudentConfig(labels=sets, **_shared(study), **options, **run)
    online = StudentConfig(labels="online", labeler=str(folder / "runs" / "labeler"), **_shared(study), **run)
    return measure_agreement(student, online)


def _boxes(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    sets = [need.removeprefix("labels-") for need in task.needs]
    return {"sets": {name: measure_boxes(folder / "labels" / name, study.boxes, SIDE) for name in sets}}


def _shared(study: Study) -> dict[str, Any]:
    return {
        "data": study.train,
        "val": study.val,
        "epochs": study.epochs,
        "batch_size": study.batch_size,
        "val_every": max(1, study.epochs // 4),
        **MACHINE,
    }


def _scores(folder: Path, run: Path) -> dict[str, Any]:
    """The run's history, and its weights on corrupted images."""
    model, description = load_model(run)
    history = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "history": history,
        "corrupted": measure_corrupted(model, description.class_names, folder / "corrupted"),
    }


_DO = {
    "corrupted": _corrupted,
    "labeler": _labeler,
    "dump": _dump,
    "student": _student,
    "agreement": _agreement,
    "boxes": _boxes,
}
