"""Do offline labels give what online ones give, and at what cost? The whole study, in one command.

    python tests/benchmarks/study.py --train tiny20-train.tar --val tiny20-val.tar --boxes tiny20-boxes.json \
        --out runs/study --jobs 2
    python tests/benchmarks/study.py --out runs/study --tables docs
    python tests/benchmarks/study.py --plan draws --train tiny180-train.tar --val tiny180-val.tar --out runs/draws \
        --side 48

It trains a labeler (fan_micro_4_p8, or the student's model with ``--labeler student``), dumps its labels in several
ways, trains a student from each (``--student``, ``--student-lr``) and scores them on clean and on corrupted validation
images. ``--jobs`` tasks run side by side, each a process with one thread. Every task's result is kept; stopped in any
way, the same command goes on where it stopped. ``--only`` runs the tasks whose names match, and what these need. The
second form writes the tables and plots of what is there, and its raw results.
"""

import argparse
import dataclasses
import fnmatch
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from study_plan import PLANS, Study, Task, make_tasks, read_result, run_task
from study_tables import write_report

from stl_offline.files import atomic_write, canonical_json

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
POLL_SECONDS = 0.5


def main() -> int:
    options = _parse()
    if not options.task:
        # Ended in any way, it must end its tasks, too; a task's own way is to save its state.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(options.out)
    if options.tables:
        write_report(folder, _stored(folder), Path(options.tables))
        return 0
    if options.task:
        study = _stored(folder)
        run_task(study, folder, next(task for task in make_tasks(study) if task.name == options.task))
        return 0
    study = Study(
        train=os.path.abspath(options.train),
        val=os.path.abspath(options.val),
        boxes=options.boxes and os.path.abspath(options.boxes),
        epochs=options.epochs,
        seeds=options.seeds,
        batch_size=options.batch_size,
        corrupted_images=options.corrupted_images,
        plan=options.plan,
        side=options.side,
        student=options.student,
        student_lr=options.student_lr,
        labeler=options.labeler,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results").mkdir(exist_ok=True)
    path = folder / "study.json"
    if path.is_file() and _stored(folder) != study:
        print(f"{folder} holds a study with other settings: {_stored(folder)}; choose another --out", file=sys.stderr)
        return 1
    atomic_write(path, canonical_json(dataclasses.asdict(study)))
    tasks = _wanted(make_tasks(study), options.only)
    if options.list:
        for task in tasks:
            print(f"{'done' if read_result(folder, task.name) else 'todo'}  {task.name}")
        return 0
    return run_all(tasks, folder, options.jobs)


def run_all(tasks: list[Task], folder: Path, jobs: int) -> int:
    """Run the tasks, ``jobs`` at a time, each as soon as what it needs is done; 1 where one failed."""
    done = {task.name for task in tasks if read_result(folder, task.name) is not None}
    todo = [task for task in tasks if task.name not in done]
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    failed: set[str] = set()
    print(f"{len(done)} of {len(tasks)} tasks are done", flush=True)
    try:
        while todo or running:
            ready = [task for task in todo if set(task.needs) <= done]
            for task in ready[: jobs - len(running)]:
                todo.remove(task)
                running[task.name] = (_start(task, folder), time.monotonic())
                print(f"{_clock()} starts  {task.name}", flush=True)
            if not running:
                break  # what is left needs something that failed
            time.sleep(POLL_SECONDS)
            for name, (process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                whole = process.returncode == 0 and read_result(folder, name) is not None
                (done if whole else failed).add(name)
                said = "done" if whole else f"FAILED ({process.returncode}), see {folder / 'logs' / name}.txt"
                print(f"{_clock()} {said}  {name}  {time.monotonic() - started:,.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()
    for task in todo:
        print(f"not run: {task.name}", flush=True)
    return 1 if failed else 0


def _start(task: Task, folder: Path) -> subprocess.Popen:
    (folder / "logs").mkdir(exist_ok=True)
    environment = os.environ | dict.fromkeys(THREAD_VARIABLES, "1")
    with open(folder / "logs" / f"{task.name}.txt", "ab") as log:
        command = [sys.executable, __file__, "--out", str(folder), "--task", task.name]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def _wanted(tasks: list[Task], pattern: str) -> list[Task]:
    """The tasks that match, and what they need, in the given order."""
    by_name = {task.name: task for task in tasks}
    names: set[str] = set()
    todo = [name for name in by_name if any(fnmatch.fnmatch(name, part) for part in pattern.split(","))]
    while todo:
        name = todo.pop()
        if name not in names:
            names.add(name)
            todo += by_name[name].needs
    return [task for task in tasks if task.name in names]


def _stored(folder: Path) -> Study:
    return Study(**json.loads((folder / "study.json").read_text()))


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", help="training images")
    parser.add_argument("--val", help="validation images")
    parser.add_argument("--boxes", help="JSON of object boxes; without it, where labels fall is not measured")
    parser.add_argument("--out", required=True, help="folder of the study")
    parser.add_argument("--jobs", type=int, default=2, help="tasks side by side")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each main arm")
    parser.add_argument("--side", type=int, default=64, help="pixels of a training image's side")
    parser.add_argument("--student", default="fan_micro_4_p8", help="model of the students")
    parser.add_argument("--student-lr", type=float, default=2e-3, help="learning rate of models of --student")
    parser.add_argument(
        "--labeler", choices=("micro", "student"), default="micro", help="its model: fan_micro_4_p8, or the student's"
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--corrupted-images", type=int, default=500, help="of the validation images")
    parser.add_argument("--plan", choices=PLANS, default="maps", help="what is compared")
    parser.add_argument("--only", default="*", help="names of tasks, such as 'none-*,whole-*'")
    parser.add_argument("--list", action="store_true", help="print what is done and what is not")
    parser.add_argument("--tables", metavar="DIR", help="write study.md and its plots there; train nothing")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.tables or options.task or (options.train and options.val)):
        parser.error("--train and --val are needed")
    return options


if __name__ == "__main__":
    sys.exit(main())
