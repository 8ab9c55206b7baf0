"""``stl-offline demo``: all stages on an embedded data set, a table of what came out, and a picture to look at.

Gh, Gw: the token grid; V: views.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.files import atomic_write, canonical_json
from stl_offline.geometry import View, relative_view
from stl_offline.images.pack import ensure_beton
from stl_offline.images.shapes import read_masks, write_shapes
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.picture import FigureSample, label_figure
from stl_offline.targets import TokenTargets, token_targets
from stl_offline.training.labeler import train_labeler
from stl_offline.training.student import train_student
from stl_offline.views import CropSettings, draw_views

MODEL = "fan_micro_4_p8"
SIZE = 64
CONFIDENT = 0.5  # a token is a confident one from here on
PICTURES = 8  # rows of the picture


@dataclass(frozen=True)
class Foreground:
    """Where confident tokens of the picture's own class fall, over all labelled pictures.

    inside, outside: their share among the tokens inside and outside the objects' masks.
    """

    inside: float
    outside: float


def run_demo(
    out: str | Path,
    *,
    train: int = 2000,
    val: int = 500,
    epochs: int = 5,
    shards: int = 4,
    seed: int = 0,
    device: str = "auto",
    workers: int = 0,
) -> str:
    """Run all stages below the folder ``out`` and give back the summary as text.

    Every stage goes on where an earlier call stopped. Writes ``summary.json`` and ``labels.png`` there.
    """
    out = Path(out)
    machine = {"device": device, "workers": workers}
    rows: list[dict[str, Any]] = []
    pictures = out / "pictures"
    _timed(rows, "pictures", lambda: write_shapes(pictures, train=train, val=val, seed=seed, size=SIZE))
    shared = {
        "data": str(pictures / "train"),
        "val": str(pictures / "val"),
        "model": MODEL,
        "img_size": SIZE,
        "epochs": epochs,
        "batch_size": 25,
        "lr": 1e-3,
        "scale_min": 0.4,
        "seed": seed,
        **machine,
    }
    labeler = str(out / "labeler")
    labels = str(out / "labels")
    _timed(rows, "labeler", lambda: train_labeler(LabelerConfig(out=labeler, **shared)))
    dump = DumpConfig(
        data=shared["data"], labeler=labeler, out=labels, shards=shards, licence="Apache-2.0", seed=seed, **machine
    )
    _timed(rows, "labels", lambda: {"bytes": dump_labels(dump).bytes})
    for name, source in (("student", labels), ("student without labels", "none")):
        run = StudentConfig(labels=source, out=str(out / name.replace(" ", "-")), **shared)
        _timed(rows, name, lambda run=run: train_student(run))
    label_set = open_label_set(labels)
    masks = read_masks(pictures, "train")
    foreground = measure_foreground(label_set, masks)
    figure = out / "labels.png"
    label_figure(_figure_samples(label_set, shared["data"], seed), label_set.spec.class_names, figure)
    summary = {"stages": rows, "confident_inside": foreground.inside, "confident_outside": foreground.outside}
    atomic_write(out / "summary.json", canonical_json(summary))
    return _table(rows, foreground, out, figure, len(label_set))


def measure_foreground(label_set: LabelSet, masks: dict[str, np.ndarray]) -> Foreground:
    """Compare label maps of whole pictures with objects' masks, key → bool (H, W).

    A token is inside by the share of its cell that the mask covers.
    """
    grid = label_set.spec.grid
    hits = np.zeros(2)
    tokens = np.zeros(2)
    for shard in range(len(label_set.shards)):
        arrays = label_set.read_shard(shard)
        own = arrays.class_ids[:, 0, :, :, 0] == arrays.class_id[:, None, None]
        confident = own & (arrays.confidence[:, 0] >= CONFIDENT)
        inside = np.stack([_cell_means(masks[key], grid) for key in arrays.keys])
        for part, weight in enumerate((inside, 1 - inside)):
            hits[part] += (confident * weight).sum()
            tokens[part] += weight.sum()
    return Foreground(*(hits / np.maximum(tokens, 1)).tolist())


def _cell_means(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    starts = [np.arange(cells) * side // cells for side, cells in zip(mask.shape, grid, strict=True)]
    sums = np.add.reduceat(np.add.reduceat(mask.astype(np.float64), starts[0], axis=0), starts[1], axis=1)
    return sums * (grid[0] * grid[1] / mask.size)


def _timed(rows: list[dict[str, Any]], name: str, stage: Callable[[], Any]) -> None:
    started = time.perf_counter()
    result = stage()
    result = result if isinstance(result, dict) else {}
    rows.append({"stage": name, "seconds": round(time.perf_counter() - started, 1), **result})


def _figure_samples(label_set: LabelSet, data: str, seed: int) -> list[FigureSample]:
    """Some pictures with their labels, and the same labels drawn under a student's random crop."""
    beton = ensure_beton(data)
    chosen = np.linspace(0, len(beton) - 1, PICTURES).astype(int)
    crops = draw_views(
        seed, 0, chosen, beton.heights[chosen], beton.widths[chosen], CropSettings(scale=(0.25, 0.6), flip=0.5)
    )
    samples = []
    for sample, six in zip(chosen.tolist(), crops, strict=True):
        label_map = label_set[beton.keys[sample]]
        student = View.from_array(six)
        targets = TokenTargets(kind="gumbel", grid=label_set.spec.grid, m=1)
        ids, _ = token_targets(
            targets,
            label_map.class_ids[0],
            label_map.probabilities()[0],
            label_map.confidence[0],
            relative_view(label_map.view(0), student).matrix,
            label_set.spec.num_classes,
            seed=seed,
            epoch=0,
            sample_id=sample,
        )
        samples.append(
            FigureSample(
                image=beton.read_image(sample),
                class_ids=label_map.class_ids[0, :, :, 0],
                confidence=label_map.confidence[0].astype(np.float32),
                title=label_set.spec.class_names[label_map.class_id],
                view=student,
                drawn_ids=ids.reshape(label_set.spec.grid),
            )
        )
    return samples


def _table(rows: list[dict[str, Any]], foreground: Foreground, out: Path, figure: Path, samples: int) -> str:
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
        f"label set: {samples:,} pictures, {size / samples:,.0f} bytes each",
        f"confident tokens of the picture's own class: {foreground.inside:.1%} of those inside the objects' masks, "
        f"{foreground.outside:.1%} of those outside",
        f"look at: {figure}",
        f"numbers: {out / 'summary.json'}",
    ]
    return "\n".join(lines)
