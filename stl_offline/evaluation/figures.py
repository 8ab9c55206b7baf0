"""From the scores of parts to the figures of papers: per suite, as text lines, and as CSV.

A result is what `evaluate_suites` gives and ``--json`` prints: settings, and under ``suites`` for each suite

- ``imagenet``, ``sketch``, ``v2``, ``real``: scores by the classes that are compared ("all"); ``imagenet`` also those
  of the images of A's and R's classes, over these classes ("a", "r").
- ``a``, ``r``: scores over their 200 classes ("subset"), over all ("all"), and those of clean images ("clean").
- ``c`` and ``data`` (a data set of one's own): "clean", "parts" (``KIND/SEVERITY`` → scores) and `CorruptionScores`.
"""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES, corruption_scores
from stl_offline.files import atomic_write

Scores = dict[str, float]

CORRUPTIONS = (*BENCHMARK_CORRUPTIONS, *EXTRA_CORRUPTIONS)
SUITE_NAMES = {
    "imagenet": "imagenet",
    "real": "imagenet-real",
    "v2": "imagenet-v2",
    "a": "imagenet-a",
    "r": "imagenet-r",
    "sketch": "imagenet-sketch",
    "c": "imagenet-c",
    "data": "data",
}
# timm's results files, then what they do not have.
CSV_COLUMNS = (
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
    *("set", "classes", "samples", "nll", "ece"),
)


def suite_figures(parts: Sequence[tuple[str, str]], scores: Sequence[Mapping[str, Scores]]) -> dict[str, Any]:
    """The figures of each suite. parts: (suite, part) of each of ``scores``, which are by classes compared."""
    found: dict[str, dict[str, Mapping[str, Scores]]] = {}
    for (suite, part), each in zip(parts, scores, strict=True):
        found.setdefault(suite, {})[part] = each
    clean = found.get("imagenet", {}).get("imagenet", {})
    figures: dict[str, Any] = {}
    for suite, own in found.items():
        if suite in ("c", "data"):
            figures[suite] = _corruption_figures(own, clean.get("all"), generated=suite == "data")
        elif suite in ("a", "r"):
            # The headline is over the suite's own classes, as its authors and papers count.
            figures[suite] = {
                "subset": own[suite][suite],
                "all": own[suite]["all"],
                "clean": clean.get(suite),
            }
        else:
            figures[suite] = dict(own[suite])
    return figures


def _corruption_figures(
    parts: Mapping[str, Mapping[str, Scores]], imagenet: Scores | None, *, generated: bool
) -> dict[str, Any]:
    compared = next(iter(next(iter(parts.values()))))
    first = {name: found[compared] for name, found in parts.items()}
    if imagenet is not None and any(each["samples"] != imagenet["samples"] for each in first.values()):
        imagenet = None  # a part of one of them (`partial`), so maybe of other classes
    clean = first.pop("clean", imagenet)
    summary = corruption_scores(top1_by_kind(first), clean["top1"] if clean else None, generated=generated)
    return {"classes": compared, "clean": clean, **asdict(summary), "parts": first}


def top1_by_kind(parts: Mapping[str, Scores]) -> dict[str, dict[int, float]]:
    """Corruption → severity → top-1."""
    found: dict[str, dict[int, float]] = {}
    for name, scores in parts.items():
        kind, _, severity = name.partition("/")
        found.setdefault(kind, {})[int(severity)] = scores["top1"]
    return found


def score_rows(result: Mapping[str, Any]) -> Iterator[tuple[str, str, Scores]]:
    """(set, classes that are compared, scores) of everything in a result that has scores of its own."""
    every = f"{result['classes']:,}"
    for suite, name in SUITE_NAMES.items():
        own = result["suites"].get(suite)
        if own is None:
            continue
        if suite in ("a", "r"):
            yield name, f"200 of {every}", own["subset"]
            yield name, f"all {every}", own["all"]
            if own["clean"]:
                yield f"imagenet, classes of {suite.upper()}", f"200 of {every}", own["clean"]
        elif suite in ("c", "data"):
            compared = f"data's, of {every}" if own["classes"] == "subset" else f"all {every}"
            if suite == "data":
                yield name, compared, own["clean"]
            for part in (f"{kind}/{level}" for kind in CORRUPTIONS for level in SEVERITIES):
                if part in own["parts"]:
                    yield f"{name if suite == 'c' else 'generated'}/{part}", compared, own["parts"][part]
        else:
            yield name, f"all {every}", own["all"]


def settings_lines(result: Mapping[str, Any]) -> list[str]:
    """The model and the transforms of a result."""
    lines = [
        f"model: {result['model']}, {result['parameters'] / 1e6:.2f} M parameters, {result['classes']:,} classes, "
        f"weights {result['weights_sha256'][:12]}",
        f"transform: {describe_transform(result['transform'])}; mean {_numbers(result['transform']['mean'])}, "
        f"std {_numbers(result['transform']['std'])}",
    ]
    if (own := result["suites"].get("c", {}).get("transform")) is not None:
        lines.append(f"transform of c: {describe_transform(own)}")
    if result["partial"]:
        lines.append("partial: a test set may lack images; scores are of those that are there")
    if "seed" in result:
        lines.append(f"generated corruptions: seed {result['seed']}; they are not ImageNet-C")
    return lines


def describe_transform(transform: Mapping[str, Any]) -> str:
    """How images are prepared, in a phrase."""
    size = "{}×{} px".format(*transform["side"])
    if transform["as_is"]:
        return f"{size}, images of that size neither resized nor cropped (others: {transform['interpolation']})"
    return f"{size}, {transform['interpolation']}, {transform['crop_mode']} crop, crop_pct {transform['crop_pct']:g}"


def _numbers(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """A result as lines: settings, then tables."""
    rows = [
        (name, compared, f"{scores['samples']:,}", *_cells(scores))
        for name, compared, scores in score_rows(result)
        if "/" not in name
    ]
    heads = ("set", "classes", "images", "top-1 %", "top-5 %", "token top-1 %", "NLL", "ECE %")
    if not any("token_top1" in scores for _, _, scores in score_rows(result)):
        heads, rows = heads[:5] + heads[6:], [row[:5] + row[6:] for row in rows]
    lines = [*settings_lines(result), *(_aligned([heads, *rows]) if rows else [])]
    for suite in ("c", "data"):
        own = result["suites"].get(suite)
        if own and own["parts"]:
            lines += ["", *_corruption_lines("ImageNet-C" if suite == "c" else "generated corruptions", own)]
    return lines


def _cells(scores: Scores) -> tuple[str, ...]:
    return (
        f"{100 * scores['top1']:.2f}",
        f"{100 * scores['top5']:.2f}",
        f"{100 * scores['token_top1']:.2f}" if "token_top1" in scores else "–",
        f"{scores['nll']:.3f}" if "nll" in scores else "–",
        f"{100 * scores['ece']:.2f}",
    )


def _corruption_lines(title: str, own: Mapping[str, Any]) -> list[str]:
    top1 = top1_by_kind(own["parts"])
    shown = [name for name in ("error", "ce") if own[name]]
    heads = {"error": "error %", "ce": "CE %"}
    rows = [(f"{title}: top-1 % by severity", *map(str, SEVERITIES), *(heads[name] for name in shown))]
    for kinds, mark in ((BENCHMARK_CORRUPTIONS, ""), (EXTRA_CORRUPTIONS, "extra: ")):
        for kind in kinds:
            if kind in top1:
                cells = [f"{100 * top1[kind][level]:.1f}" if level in top1[kind] else "–" for level in SEVERITIES]
                figures = [f"{100 * own[name][kind]:.2f}" if kind in own[name] else "–" for name in shown]
                rows.append((mark + kind.replace("_", " "), *cells, *figures))
    return [*_aligned(rows), *_summary_lines(own)]


def _summary_lines(own: Mapping[str, Any]) -> list[str]:
    """Mean accuracy, mCE and retention; why they are missing where they are."""
    if own["top1"] is None:
        return ["no means: they take all 15 corruptions of the benchmark at all 5 severities"]
    mce = "" if own["mce"] is None else f"mCE {100 * own['mce']:.2f} %, "
    lines = [f"{mce}mean top-1 {100 * own['top1']:.2f} %, over the benchmark's 15 corruptions"]
    if own["retention"] is None:
        return [*lines, "no retention: it takes the accuracy on the same images without corruption (suite imagenet)"]
    return [*lines, f"retention {100 * own['retention']:.2f} % of the clean top-1, {100 * own['clean']['top1']:.2f} %"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]


def write_csv(result: Mapping[str, Any], path: str) -> None:
    """Write a result in timm's columns, one row per set. Raises TargetError."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    transform = result["transform"]
    for name, compared, scores in score_rows(result):
        settings = transform
        if name.startswith("imagenet-c"):
            settings = result["suites"]["c"].get("transform") or transform
        writer.writerow(
            {
                "model": result["model"],
                "top1": _percent(scores["top1"]),
                "top1_err": _percent(1 - scores["top1"]),
                "top5": _percent(scores["top5"]),
                "top5_err": _percent(1 - scores["top5"]),
                "param_count": f"{result['parameters'] / 1e6:.2f}",
                "img_size": settings["side"][-1],
                "crop_pct": settings["crop_pct"] if not settings["as_is"] else 1.0,
                "interpolation": settings["interpolation"],
                "set": name,
                "classes": compared.replace(",", ""),
                "samples": scores["samples"],
                "nll": f"{scores['nll']:.5f}" if "nll" in scores else "",
                "ece": f"{scores['ece']:.5f}",
            }
        )
    atomic_write(path, stream.getvalue().encode())


def _percent(share: float) -> str:
    return f"{100 * share:.3f}"
