"""What the study consists of: its tasks, what each needs, and how each is done in a process of its own."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from study_corruptions import make_corrupted, measure_corrupted
from study_measures import measure_agreement, measure_boxes

from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.evaluation import evaluate
from stl_offline.files import atomic_write, canonical_json
from stl_offline.models import load_model
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student

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
    plan: str = "maps"
    side: int = 64
    student: str = "fan_micro_4_p8"
    student_lr: float = 2e-3
    labeler: str = "micro"


@dataclass(frozen=True)
class Task:
    """One piece of work: its result lies in ``results/NAME.json`` once it is done."""

    name: str
    kind: str
    needs: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What is compared. sets: name → dump options; "epochs" crops are one for each epoch of a run.

    main: the arms with every seed, labels and what else differs from the defaults; other: those with one seed. against:
    the arm that the others are compared with, seed by seed; differences: pairs of main arms.
    """

    sets: dict[str, dict[str, Any]]
    main: dict[str, dict[str, Any]]
    other: dict[str, dict[str, Any]]
    against: str
    differences: tuple[tuple[str, str], ...]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """All arms, the main ones first."""
        return self.main | self.other


MAPS = Plan(
    sets={
        "whole": {},
        "whole-128": {"img_size": 128},
        "whole-k1": {"top_k": 1},
        "whole-k20": {"top_k": 20},
        "views": {"crops_per_image": "epochs"},
        "views-4": {"crops_per_image": 4},
    },
    main={
        "none": {"labels": "none"},
        "online": {"labels": "online"},
        "whole": {"labels": ("whole",)},
        "views": {"labels": ("views",)},
    },
    other={
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
    },
    against="whole",
    differences=(
        ("online", "none"),
        ("whole", "none"),
        ("views", "none"),
        ("whole", "online"),
        ("views", "online"),
    ),
)
# With many classes, where the best five hold a part of the probability alone.
DRAWS = Plan(
    sets={
        "views-draws": {"crops_per_image": "epochs", "top_k": None, "draws": 1},
        "views-top5": {"crops_per_image": "epochs"},
        "whole-twice-draws": {"img_size": "twice", "top_k": None, "draws": 16},
        "views-hybrid": {"crops_per_image": "epochs", "draws": 1},
        "views-draws-class": {"crops_per_image": "epochs", "top_k": None, "draws": 1, "class_top_k": 5},
    },
    main={
        "none": {"labels": "none"},
        "online": {"labels": "online"},
        "views-draws": {"labels": ("views-draws",)},
        "views-draws-repeats4": {"labels": ("views-draws",), "repeats": 4},
        "views-top5": {"labels": ("views-top5",)},
        "views-top5-tokens": {"labels": ("views-top5",), "token_norm": "tokens"},
        "whole-twice-draws": {"labels": ("whole-twice-draws",)},
    },
    other={
        "views-hybrid": {"labels": ("views-hybrid",)},
        "views-ghost": {"labels": ("views-top5",), "residual": "ghost"},
        "views-class": {"labels": ("views-top5",), "residual": "class"},
        "views-distil": {"labels": ("views-draws-class",), "class_target": "mix:0.5"},
    },
    against="views-top5",
    differences=(
        ("online", "none"),
        ("views-draws", "none"),
        ("views-top5", "none"),
        ("views-top5-tokens", "none"),
        ("whole-twice-draws", "none"),
        ("views-draws", "online"),
        ("views-draws-repeats4", "views-draws"),
        ("views-top5", "online"),
        ("views-top5-tokens", "online"),
        ("whole-twice-draws", "online"),
    ),
)
PLANS = {"maps": MAPS, "draws": DRAWS}


def make_tasks(study: Study) -> list[Task]:
    """Every task, those first that others wait for."""
    plan = PLANS[study.plan]
    tasks = [Task("corrupted", "corrupted"), Task("labeler", "labeler", ("corrupted",))]
    tasks += [Task(f"labels-{name}", "dump", ("labeler",), options) for name, options in plan.sets.items()]
    arms = [(name, options, seed) for seed in range(study.seeds) for name, options in plan.main.items()]
    # The first seed of everything before the others': a study cut short still has every arm.
    first = arms[: len(plan.main)] + [(name, options, 0) for name, options in plan.other.items()]
    for name, options, seed in first + arms[len(plan.main) :]:
        labels = options["labels"]
        needs = {"none": (), "online": ("labeler",)}.get(labels) if isinstance(labels, str) else None
        needs = tuple(f"labels-{each}" for each in labels) if needs is None else needs
        tasks.append(Task(f"{name}-seed{seed}", "student", ("corrupted", *needs), options | {"seed": seed}))
    # What one draw says of a token is no distribution to compare.
    tasks += [
        Task(f"agreement-{name}", "agreement", (f"labels-{name}",), {"sets": (name,)})
        for name, options in plan.sets.items()
        if not options.get("draws")
    ]
    zoom = ("whole", "whole-128")
    if set(zoom) <= set(plan.sets):
        tasks.append(Task("agreement-zoom", "agreement", tuple(f"labels-{name}" for name in zoom), {"sets": zoom}))
    if study.boxes is not None and set(zoom) <= set(plan.sets):
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
    make_corrupted(study.val, folder / "corrupted", study.side, study.corrupted_images, seed=0)
    return {}


def _labeler(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    run = folder / "runs" / "labeler"
    # Labels of every step need the student's grid of tokens.
    own = {"model": study.student, "lr": study.student_lr} if study.labeler == "student" else {}
    summary = train_labeler(LabelerConfig(out=str(run), seed=0, **_shared(study), **own))
    return summary | _scores(study, folder, run)


def _dump(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    words = {"epochs": study.epochs, "twice": 2 * study.side}
    options = {name: words.get(value, value) for name, value in task.options.items()}
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
    shared = _shared(study) | {"model": study.student, "lr": study.student_lr}
    if options["seed"] > 0 or task.name.removesuffix("-seed0") not in PLANS[study.plan].main:
        # Curves are looked at for the first seed of the main arms; scoring takes a tenth of a run's time.
        shared["val_every"] = study.epochs
    summary = train_student(StudentConfig(labels=labels, out=str(run), **shared, **options))
    return summary | _scores(study, folder, run)


def _agreement(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    sets = tuple(str(folder / "labels" / name) for name in task.options["sets"])
    pick = {"labels_pick": "zoom"} if len(sets) > 1 else {}
    options = {"color_jitter": 0.0, "token_target": "soft", "soft_classes": 20, "residual": "uniform"} | pick
    run = {"out": str(folder / "unused"), "seed": 1, "model": study.student}
    student = StudentConfig(labels=sets, **_shared(study), **options, **run)
    online = StudentConfig(labels="online", labeler=str(folder / "runs" / "labeler"), **_shared(study), **run)
    return measure_agreement(student, online)


def _boxes(study: Study, folder: Path, task: Task) -> dict[str, Any]:
    sets = [need.removeprefix("labels-") for need in task.needs]
    return {"sets": {name: measure_boxes(folder / "labels" / name, study.boxes, study.side) for name in sets}}


def _shared(study: Study) -> dict[str, Any]:
    return {
        "data": study.train,
        "val": study.val,
        "img_size": study.side,
        "epochs": study.epochs,
        "batch_size": study.batch_size,
        "val_every": max(1, study.epochs // 4),
        **MACHINE,
    }


def _scores(study: Study, folder: Path, run: Path) -> dict[str, Any]:
    """The run's history, its calibration error, and its weights on corrupted images."""
    model, description = load_model(run)
    history = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {
        "history": history,
        "ece": evaluate(EvaluateConfig(checkpoint=str(run), data=study.val, **MACHINE))["ece"],
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
