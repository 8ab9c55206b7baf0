"""The study's tables and plots, from whatever results a folder holds."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator
from study_corruptions import KINDS
from study_plan import PLANS, Plan, Study, read_result

DASH = "–"
LABELS = {
    "none": "no labels",
    "online": "the labeler in every step",
    "whole": "dumped, one map of the whole image",
    "views": "dumped, as many crops as epochs, replayed",
    "zoom": "`whole` and `whole-128`, picked by zoom",
    "whole-128": "one map at twice the size",
    "views-4": "4 crops, replayed in turn",
    "whole-soft": "soft targets",
    "whole-argmax": "argmax targets",
    "whole-uniform": "the residual spread evenly",
    "whole-k1": "k = 1",
    "whole-k20": "k = 20: all classes",
    "whole-half": "half the weight of the token loss",
    "whole-double": "twice the weight of the token loss",
    "views-draws": "dumped, as many crops as epochs, 1 draw",
    "views-draws-repeats4": "the same, 4 crops of an image in a batch",
    "views-top5": "the same crops, k = 5, `--token-norm mass`",
    "views-top5-tokens": "the same crops, k = 5, `--token-norm tokens`",
    "whole-twice-draws": "one map at twice the size, 16 draws",
    "views-hybrid": "the crops, k = 5 and 1 draw of the rest",
    "views-ghost": "k = 5, `--residual ghost`",
    "views-class": "k = 5, `--residual class`",
    "views-distil": "1 draw, and `--class-target mix:0.5`",
}


def write_report(folder: Path, study: Study, out: Path) -> None:
    """Write ``study.md``, ``study-curves.png``, ``study-corruptions.png`` and ``study-results.json``: all of it."""
    plan = PLANS[study.plan]
    runs = {arm: _results(folder, arm, study.seeds) for arm in plan.arms}
    runs = {arm: results for arm, results in runs.items() if results}
    first = {arm: found for arm in plan.arms if (found := read_result(folder, f"{arm}-seed0")) is not None}
    labeler = read_result(folder, "labeler")
    parts = [
        _accuracy(runs, labeler, folder, study),
        _differences(runs, plan),
        _against(first, plan),
        _by_epoch(first, labeler, study),
        _corruptions(runs, labeler, plan),
        _sets(folder, plan),
        _agreement(folder, plan),
        _boxes(folder),
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.md").write_text("\n\n".join(part for part in parts if part) + "\n")
    results = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    settings = {name: value for name, value in asdict(study).items() if name not in ("train", "val", "boxes")}
    kept = {"settings": settings, "results": _rounded(results)}
    (out / "study-results.json").write_text(json.dumps(kept, sort_keys=True))
    if runs:
        main = {arm: runs[arm] for arm in plan.main if arm in runs}
        _plot_curves(main, labeler, out / "study-curves.png")
        _plot_corruptions(main, out / "study-corruptions.png")


def _rounded(value: Any) -> Any:
    """Numbers to five digits, which is more than they mean."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _results(folder: Path, arm: str, seeds: int) -> list[dict[str, Any]]:
    found = (read_result(folder, f"{arm}-seed{seed}") for seed in range(seeds))
    return [result for result in found if result is not None]


def corrupted_mean(result: dict[str, Any]) -> float:
    """Top-1 over all kinds and severities."""
    return float(np.mean(list(result["corrupted"]["kinds"].values())))


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation in per cent; the mean alone of a single value."""
    mean = f"{100 * np.mean(values):.1f}"
    return f"{mean} ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else mean


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _accuracy(runs: dict[str, list[dict]], labeler: dict | None, folder: Path, study: Study) -> str:
    head = [
        "",
        "seeds",
        "top-1 %",
        "not averaged %",
        "ECE %",
        "corrupted %",
        "retention %",
        "CPU s per epoch",
        "label bytes",
    ]
    rows = [_accuracy_row("the labeler itself", [labeler], "", study)] if labeler else []
    for arm, results in runs.items():
        labels = PLANS[study.plan].arms[arm]["labels"]
        names = () if isinstance(labels, str) else labels
        sizes = [read_result(folder, f"labels-{name}") for name in names]
        size = f"{sum(each['bytes'] for each in sizes if each):,}" if sizes else DASH
        rows.append(_accuracy_row(f"`{arm}`: {LABELS[arm]}", results, size, study))
    return _table(head, rows) if rows else ""


def _accuracy_row(label: str, results: list[dict], size: str, study: Study) -> list[str]:
    retention = [corrupted_mean(result) / result["corrupted"]["clean"] for result in results]
    epoch = np.mean([result["train_cpu_seconds"] / study.epochs for result in results])
    plain = [result["top1_not_averaged"] for result in results if "top1_not_averaged" in result]
    return [
        label,
        str(len(results)),
        spread([result["top1"] for result in results]),
        spread(plain) if plain else DASH,
        spread([result["ece"] for result in results]),
        spread([corrupted_mean(result) for result in results]),
        spread(retention),
        f"{epoch:.0f}",
        size,
    ]


def _differences(runs: dict[str, list[dict]], plan: Plan) -> str:
    """Pairs of main arms: mean difference and its standard error over seeds.

    Few seeds say little of an arm's own spread: that of all main arms is pooled.
    """
    values = (
        lambda result: 100 * result["top1"],
        lambda result: 100 * result["ece"],
        lambda result: 100 * corrupted_mean(result),
    )
    variances = [_pooled_variance([list(map(value, runs.get(arm, []))) for arm in plan.main]) for value in values]
    rows = []
    for arm, other in plan.differences:
        if arm not in runs or other not in runs:
            continue
        cells = [f"{arm} − {other}"]
        for value, variance in zip(values, variances, strict=True):
            cells.append(_difference(list(map(value, runs[arm])), list(map(value, runs[other])), variance))
        rows.append(cells)
    return _table(["points", "top-1", "ECE", "corrupted"], rows) if rows else ""


def _against(first: dict[str, dict], plan: Plan) -> str:
    """Points of the arms with one seed above the plan's arm of comparison, in the first seed."""
    if plan.against not in first:
        return ""
    plain = first[plan.against]
    rows = []
    for arm, run in ((arm, first[arm]) for arm in plan.other if arm in first):
        gains = (
            run["top1"] - plain["top1"],
            run["ece"] - plain["ece"],
            corrupted_mean(run) - corrupted_mean(plain),
        )
        rows.append([f"`{arm}`", *(f"{100 * gain:+.1f}" for gain in gains)])
    return _table([f"points above `{plan.against}`, same seed", "top-1", "ECE", "corrupted"], rows) if rows else ""


def _pooled_variance(groups: Sequence[Sequence[float]]) -> float:
    """Of single values within their groups; NaN where no group has two."""
    squares = sum(float(np.var(group)) * len(group) for group in groups if group)
    free = sum(len(group) - 1 for group in groups if group)
    return squares / free if free else math.nan


def _difference(ours: Sequence[float], theirs: Sequence[float], variance: float) -> str:
    mean = f"{np.mean(ours) - np.mean(theirs):+.1f}"
    error = math.sqrt(variance * (1 / len(ours) + 1 / len(theirs)))
    return mean if math.isnan(error) else f"{mean} (standard error {error:.1f})"


def _by_epoch(first: dict[str, dict], labeler: dict | None, study: Study) -> str:
    """Where the main arms stand after each quarter of their epochs: the first seed, which is measured on the way."""
    epochs = sorted({max(1, study.epochs * quarter // 4) for quarter in range(1, 5)})
    columns = {"the labeler itself": labeler} if labeler else {}
    columns |= {f"`{arm}`": first[arm] for arm in PLANS[study.plan].main if arm in first}
    rows = []
    for name, result in columns.items():
        found = {entry["epoch"]: entry["top1"] for entry in result["history"] if entry.get("top1") is not None}
        rows.append([name, *(f"{100 * found[epoch]:.1f}" if epoch in found else DASH for epoch in epochs)])
    return _table(["top-1 % after epoch (first seed)", *map(str, epochs)], rows) if rows else ""


def _corruptions(runs: dict[str, list[dict]], labeler: dict | None, plan: Plan) -> str:
    columns = {"labeler": [labeler]} if labeler else {}
    columns |= {arm: runs[arm] for arm in plan.main if arm in runs}
    rows = []
    for family, kinds in KINDS.items():
        for kind in kinds:
            means = [
                [np.mean(result["corrupted"]["kinds"][kind]) for result in results] for results in columns.values()
            ]
            rows.append([f"{family}: {kind.replace('_', ' ')}", *map(spread, means)])
    return _table(["top-1 %, mean of severities", *columns], rows) if columns else ""


def _sets(folder: Path, plan: Plan) -> str:
    rows = []
    for name in plan.sets:
        result = read_result(folder, f"labels-{name}")
        if result:
            each = result["bytes"] / result["samples"]
            seconds = DASH if result["cpu_seconds"] is None else f"{result['cpu_seconds']:,.0f}"
            rows.append([name, f"{result['bytes']:,}", f"{each:,.0f}", seconds])
    return _table(["label set", "bytes", "bytes per image", "CPU s"], rows) if rows else ""


def _agreement(folder: Path, plan: Plan) -> str:
    rows = []
    for name in (*plan.sets, "zoom"):
        result = read_result(folder, f"agreement-{name}")
        if result:
            small = result["small"] or {"top1": math.nan, "kl": math.nan}
            cells = [100 * result["top1"], result["kl"], 100 * small["top1"], small["kl"]]
            rows.append([name, *(f"{cell:.{digits}f}" for cell, digits in zip(cells, (1, 3, 1, 3), strict=True))])
    head = ["dumped against online", "same best class %", "KL, nats", "crops < half the area: same %", "KL, nats"]
    return _table(head, rows) if rows else ""


def _boxes(folder: Path) -> str:
    result = read_result(folder, "boxes")
    if result is None:
        return ""
    rows = [
        [name, *(f"{100 * found[part]:.1f}" for part in ("inside", "outside", "box_share"))]
        for name, found in result["sets"].items()
    ]
    return _table(["confident tokens of the image's class", "inside %", "outside %", "area of the boxes %"], rows)


def _plot_curves(runs: dict[str, list[dict]], labeler: dict | None, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = runs | ({"labeler": [labeler]} if labeler else {})
    for arm, results in shown.items():
        for axis, field in zip(axes, ("top1", "class_loss"), strict=True):
            for number, result in enumerate(results):
                unit = 100 if field == "top1" else 1
                points = [
                    (each["epoch"], unit * each[field]) for each in result["history"] if each.get(field) is not None
                ]
                label = arm if number == 0 else None
                color = f"C{list(shown).index(arm)}"
                axis.plot(*zip(*points, strict=True), marker="." if field == "top1" else "", color=color, label=label)
    axes[0].set(xlabel="epoch", ylabel="validation top-1, %")
    axes[1].set(xlabel="epoch", ylabel="training loss of the class head")
    axes[0].legend()
    for axis in axes:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _plot_corruptions(runs: dict[str, list[dict]], path: Path) -> None:
    shown = runs
    kinds = [kind for family in KINDS.values() for kind in family]
    figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
    width = 0.8 / max(1, len(shown))
    for number, (arm, results) in enumerate(shown.items()):
        values = np.array([[100 * np.mean(result["corrupted"]["kinds"][kind]) for kind in kinds] for result in results])
        bars = values.std(axis=0, ddof=1) if len(values) > 1 else None
        axis.bar(np.arange(len(kinds)) + number * width, values.mean(axis=0), width, yerr=bars, label=arm)
    axis.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, [kind.replace("_", "\n", 1) for kind in kinds])
    axis.set(ylabel="top-1 %, mean of severities")
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
