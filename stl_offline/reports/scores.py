"""A page of what ``stl-offline evaluate --json`` printed for suites and corruptions: models side by side."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stl_offline.config import ReportConfig
from stl_offline.errors import FormatError, InputError
from stl_offline.evaluation import (
    BENCHMARK_CORRUPTIONS,
    EXTRA_CORRUPTIONS,
    RESULT_VERSION,
    SEVERITIES,
    describe_transform,
    score_rows,
    top1_by_kind,
)
from stl_offline.files import read_file
from stl_offline.reports.charts import DASHES, HATCHES, Bars, Chart, Series, bar_chart, line_chart
from stl_offline.reports.html import render_page, write_page

FAMILIES = {
    "noise": BENCHMARK_CORRUPTIONS[:3],
    "blur": BENCHMARK_CORRUPTIONS[3:7],
    "weather": BENCHMARK_CORRUPTIONS[7:11],
    "digital": BENCHMARK_CORRUPTIONS[11:],
    "extra kinds": EXTRA_CORRUPTIONS,
}
_DASH = "–"


@dataclass(frozen=True)
class ScoresReport:
    """What was written."""

    page: Path
    bytes: int


@dataclass(frozen=True)
class Column:
    """A column of the first table. better: 1 where higher is better, −1 where lower is."""

    head: str
    value: Callable[[Mapping[str, Any]], float | None]
    better: int = 1


def _of(*path: str) -> Callable[[Mapping[str, Any]], float | None]:
    """A number of a result's suites, by names; None where something on the way is not there."""

    def value(result: Mapping[str, Any]) -> float | None:
        found: Any = result["suites"]
        for name in path:
            found = found.get(name) if found is not None else None
        return found

    return value


COLUMNS = (
    Column("ImageNet", _of("imagenet", "all", "top1")),
    Column("ReaL", _of("real", "all", "top1")),
    Column("V2", _of("v2", "all", "top1")),
    Column("A, 200 classes", _of("a", "subset", "top1")),
    Column("A, all classes", _of("a", "all", "top1")),
    Column("R, 200 classes", _of("r", "subset", "top1")),
    Column("R, all classes", _of("r", "all", "top1")),
    Column("Sketch", _of("sketch", "all", "top1")),
    Column("C, mCE", _of("c", "mce"), -1),
    Column("C, mean top-1", _of("c", "top1")),
    Column("C, retention", _of("c", "retention")),
    Column("data, clean", _of("data", "clean", "top1")),
    Column("generated corruptions, mean top-1", _of("data", "top1")),
    Column("generated corruptions, retention", _of("data", "retention")),
)


def report_scores(config: ReportConfig) -> ScoresReport:
    """Write the page.

    Raises:
        InputError: a file that is not there, or given twice; too many; a page that exceeds ``config.max_mb``.
        FormatError: a file that holds no result of ``evaluate --json``.
    """
    if len(set(config.runs)) < len(config.runs):
        raise InputError("the same result is given twice; pass each once")
    if len(config.runs) > len(HATCHES):
        raise InputError(f"a page shows up to {len(HATCHES)} models, got {len(config.runs)}")
    results = [_read(Path(path)) for path in config.runs]
    names = _names(config.runs)
    try:
        page = render_page("scores.html", **_page_values(names, results))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"one of {', '.join(config.runs)} holds no whole result of evaluate ({error}); evaluate again"
        ) from error
    if len(page) > config.max_mb * 1e6:
        raise InputError(f"the page takes {len(page) / 1e6:.1f} MB; raise `max_mb` (now {config.max_mb:g})")
    return ScoresReport(write_page(config.out, page), len(page))


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(read_file(path))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON ({error}); give what evaluate printed as JSON") from error
    if not isinstance(result, dict) or not isinstance(result.get("suites"), dict):
        raise FormatError(f"{path} holds no suites; give what evaluate printed as JSON, for suites or corruptions")
    if result.get("version") != RESULT_VERSION:
        raise FormatError(f"{path} is of version {result.get('version')!r}; this release reads {RESULT_VERSION}")
    return result


def _names(paths: Sequence[str]) -> list[str]:
    stems = [Path(path).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def _page_values(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the template ``scores.html`` shows."""
    return {
        "title": f"Robustness of {', '.join(names)}" if len(names) < 4 else f"Robustness of {len(names)} models",
        "warnings": _warnings(names, results),
        "models": [
            {"name": name, "color": f"var(--s{number})", "facts": _facts(result), "hatched": number > 0}
            for number, (name, result) in enumerate(zip(names, results, strict=True))
        ],
        "overview": _overview(names, results),
        "sets": [(name, *row) for name, result in zip(names, results, strict=True) for row in _set_rows(result)],
        "sections": [
            section
            for suite, title in (("c", "ImageNet-C"), ("data", "Generated corruptions"))
            if (section := _section(suite, title, names, results)) is not None
        ],
    }


def _warnings(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[str]:
    found = [
        f"{name}: scored on a part of the suites" for name, each in zip(names, results, strict=True) if each["partial"]
    ]
    if any("seed" in each for each in results):
        found.append("Generated corruptions are not ImageNet-C: compare them only with each other.")
    return found


def _facts(result: Mapping[str, Any]) -> dict[str, str]:
    transform = result["transform"]
    facts = {
        "model": f"{result['model']}, {result['parameters'] / 1e6:.2f} M parameters, {result['classes']:,} classes",
        "weights": result["weights_sha256"][:16],
        "transform": describe_transform(transform),
        "mean, std": "; ".join(" ".join(f"{value:.3f}" for value in transform[name]) for name in ("mean", "std")),
        "mixed precision": result["amp"],
    }
    if (own := result["suites"].get("c", {}).get("transform")) is not None:
        facts["transform of ImageNet-C"] = describe_transform(own)
    if "seed" in result:
        facts["seed of generated corruptions"] = str(result["seed"])
    return facts


def _overview(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [column for column in COLUMNS if any(column.value(result) is not None for result in results)]
    rows = [[{"text": name, "best": False}] for name in names]
    for column in columns:
        values = [column.value(result) for result in results]
        known = [value * column.better for value in values if value is not None]
        best = max(known) if len(set(known)) > 1 else None
        for row, value in zip(rows, values, strict=True):
            is_best = best is not None and value is not None and value * column.better == best
            row.append({"text": _DASH if value is None else f"{value:.2%}", "best": is_best})
    return {"heads": ["model", *(column.head for column in columns)], "rows": rows}


def _set_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            compared,
            f"{scores['samples']:,}",
            f"{scores['top1']:.2%}",
            f"{scores['top5']:.2%}",
            f"{scores['token_top1']:.2%}" if "token_top1" in scores else _DASH,
            f"{scores['nll']:.3f}" if "nll" in scores else _DASH,
            f"{scores['ece']:.2%}",
        )
        for name, compared, scores in score_rows(result)
    ]


def _section(
    suite: str, title: str, names: Sequence[str], results: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Charts and the table of errors of corruptions; None where no model has any."""
    own = [result["suites"].get(suite) or {"parts": {}} for result in results]
    top1 = [top1_by_kind(each["parts"]) for each in own]
    kinds = [kind for family in FAMILIES.values() for kind in family if any(kind in each for each in top1)]
    if not kinds:
        return None
    charts: list[Chart | None] = []
    levels = [f"severity {level}" for level in SEVERITIES]
    for family, members in FAMILIES.items():
        shown = [kind for kind in members if kind in kinds]
        bars = [
            Bars(
                name,
                number,
                tuple(tuple(top1[number].get(kind, {}).get(level) for level in SEVERITIES) for kind in shown),
            )
            for number, name in enumerate(names)
        ]
        if shown:
            groups = [kind.replace("_", " ") for kind in shown]
            charts.append(bar_chart(f"{title}: {family}", "top-1 accuracy", groups, levels, bars))
    charts.append(_by_severity(title, names, top1))
    retained = [each.get("retention") for each in own]
    if any(value is not None for value in retained):
        bars = [Bars(name, number, ((retained[number],),)) for number, name in enumerate(names)]
        charts.append(bar_chart(f"{title}: retention", "corrupted / clean top-1", ["retention"], [""], bars))
    rows = []
    for kind in kinds:
        mark = "extra: " if kind in EXTRA_CORRUPTIONS else ""
        cells = [_share(each.get(name, {}).get(kind)) for each in own for name in _shown_figures(own)]
        rows.append((mark + kind.replace("_", " "), *cells))
    heads = [f"{name}, {'error' if figure == 'error' else 'CE'}" for name in names for figure in _shown_figures(own)]
    return {"title": title, "charts": [chart for chart in charts if chart], "heads": heads, "rows": rows}


def _shown_figures(own: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in ("error", "ce") if any(each.get(name) for each in own)]


def _by_severity(title: str, names: Sequence[str], top1: Sequence[Mapping[str, Mapping[int, float]]]) -> Chart | None:
    """Mean top-1 over the benchmark's corruptions at each severity, of the models that have them all."""
    series = []
    for number, (name, found) in enumerate(zip(names, top1, strict=True)):
        if all(set(found.get(kind, ())) == set(SEVERITIES) for kind in BENCHMARK_CORRUPTIONS):
            means = [sum(found[kind][level] for kind in BENCHMARK_CORRUPTIONS) / 15 for level in SEVERITIES]
            series.append(Series(name, number % len(DASHES), tuple(zip(map(float, SEVERITIES), means, strict=True))))
    chart_title = f"{title}: mean of the 15 corruptions by severity"
    return line_chart(chart_title, "severity", "top-1 accuracy", series, ".1%") if series else None


def _share(value: float | None) -> str:
    return _DASH if value is None else f"{value:.2%}"
