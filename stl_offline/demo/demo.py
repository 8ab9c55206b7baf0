"""``stl-offline demo``: all stages on a synthetic data set, a table of the results, and two pages.

Gh, Gw: the token grid; V: views.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stl_offline.config import DumpConfig, LabelerConfig, PreviewConfig, ReportConfig, StudentConfig
from stl_offline.demo.shapes import write_shapes
from stl_offline.dump import check_shards, dump_labels
from stl_offline.errors import StlError, counted
from stl_offline.files import atomic_write, canonical_json
from stl_offline.images.masks import read_masks
from stl_offline.labels.foreground import CONFIDENT, Foreground, measure_foreground, to_json
from stl_offline.labels.label_set import open_label_set
from stl_offline.reports.find import find_images
from stl_offline.reports.preview import preview_labels
from stl_offline.reports.report import report_runs
from stl_offline.training.run_folder import ADVICE
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student

MODEL = "fan_micro_4_p8"
SIZE = 64
LABEL_SIZE = 96  # tokens show more of an object's outline at half as much again as the training size
# What makes labels emerge: token logits are pooled by log-mean-exp, so that the tokens that show the class are enough,
# and the token loss is heavy (tests/benchmarks/emergence.py).
LABELER = {"token_pool": "lme", "token_weight": 5.0}
IMAGES = 8  # images on the page of labels


def run_demo(
    out: str | Path,
    *,
    train: int = 1600,
    val: int = 300,
    epochs: int = 5,
    labeler_epochs: int = 12,
    shards: int = 4,
    draws: int = 0,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
) -> str:
    """Run all stages below the folder ``out`` and return the summary as text.

    epochs: of each student; labeler_epochs: of the labeler; draws: classes stored per token that are drawn, in place of
    the five most probable ones (0: none).

    Every stage resumes where an earlier call stopped. Writes ``summary.json``, ``labels.html`` and
    ``report.html`` there.
    """
    out = Path(out)
    machine = {"device": device, "workers": workers}
    rows: list[dict[str, Any]] = []
    images = out / "images"
    shared = {
        "data": str(images / "train"),
        "val": str(images / "val"),
        "model": MODEL,
        "img_size": SIZE,
        "epochs": epochs,
        "batch_size": 20,
        "lr": 1e-3,
        "scale_min": 0.4,
        "seed": seed,
        **machine,
    }
    check_shards(shards, train)
    labeler = str(out / "labeler")
    labels = str(out / "labels")
    stage_1 = LabelerConfig(out=labeler, **shared | LABELER | {"epochs": labeler_epochs})
    dump = DumpConfig(
        data=shared["data"],
        labeler=labeler,
        img_size=LABEL_SIZE,
        out=labels,
        shards=shards,
        draws=draws,
        licence="Apache-2.0",
        **machine,
    )
    students = {
        name: StudentConfig(labels=source, out=str(out / name.replace(" ", "-")), **shared)
        for name, source in (("student", labels), ("student without labels", "none"))
    }
    _timed(rows, "images", lambda: write_shapes(images, train=train, val=val, seed=seed, size=SIZE))
    _timed(rows, "labeler", lambda: train_labeler(stage_1))
    _timed(rows, "labels", lambda: {"bytes": dump_labels(dump).bytes})
    for name, run in students.items():
        _timed(rows, name, lambda run=run: train_student(run))
    label_set = open_label_set(labels)
    foreground = measure_foreground(label_set, read_masks(images / "masks-train.npz"))
    runs = (*(run.out for run in students.values()), labeler)
    pages = _write_pages(out, shared, labels, runs, machine)
    summary = {"stages": rows, **to_json(foreground)}
    atomic_write(out / "summary.json", canonical_json(summary))
    return _table(rows, foreground, out, pages, len(label_set))


def _timed(rows: list[dict[str, Any]], name: str, stage: Callable[[], Any]) -> None:
    started = time.perf_counter()
    try:
        result = stage()
    except StlError as error:
        # What a single run offers: the demo has no such option.
        text = str(error).replace(ADVICE, "choose another `out`, or remove this one")
        raise type(error)(text) from error
    result = result if isinstance(result, dict) else {}
    rows.append({"stage": name, "seconds": round(time.perf_counter() - started, 1), **result})


def _write_pages(
    out: Path, shared: dict[str, Any], labels: str, runs: tuple[str, ...], machine: dict[str, Any]
) -> list[Path]:
    """The page of labels and the report of all runs."""
    preview = PreviewConfig(
        path=labels,
        data=shared["data"],
        out=str(out),
        samples=IMAGES,
        threshold=CONFIDENT,
        student_seed=shared["seed"],
        scale_min=shared["scale_min"],
        all_shards=True,
    )
    report = ReportConfig(
        runs=runs, data=shared["val"], labels=(labels,), out=str(out / "report.html"), seed=shared["seed"], **machine
    )
    return [preview_labels(preview, find_images).page, report_runs(report).page]


def _table(rows: list[dict[str, Any]], foreground: Foreground, out: Path, pages: list[Path], samples: int) -> str:
    lines = [f"{'stage':<24}{'seconds':>9}{'top-1':>9}{'token top-1':>13}"]
    for row in rows:
        scores = "".join(
            f"{row[name]:>{width}.1%}" if row.get(name) is not None else " " * width
            for name, width in (("top1", 9), ("token_top1", 13))
        )
        lines.append(f"{row['stage']:<24}{row['seconds']:>9.1f}{scores}")
    size = next(row["bytes"] for row in rows if "bytes" in row)
    lines += [
        "",
        f"label set: {counted(samples, 'image')}, {size / samples:,.0f} bytes each",
        f"confident tokens of the image's own class: {foreground.confident_inside:.1%} of those inside the objects' "
        f"masks, {foreground.confident_outside:.1%} of those outside (contrast {foreground.contrast:.1f})",
        f"probability of the own class as a test of being inside: AUROC {foreground.auroc:.2f}",
        *(f"look at: {page}" for page in pages),
        f"numbers: {out / 'summary.json'}",
    ]
    return "\n".join(lines)
