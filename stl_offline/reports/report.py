"""``stl-offline report``: one page about one run, or several side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stl_offline.config import ReportConfig
from stl_offline.errors import InputError
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.charts import Chart, Series, line_chart
from stl_offline.reports.examples import ExampleGroup, example_groups, numbered, page_of
from stl_offline.reports.facts import label_set_facts
from stl_offline.reports.page import render_page, write_page
from stl_offline.reports.predictions import Predicted, predict
from stl_offline.reports.runs import Run, read_runs, setting_rows

STYLES = 6  # line styles that the page's CSS has

# Title, axis label with its unit, name in the log, how it is written.
CURVES = (
    ("Loss", "loss (nats)", "loss", ".3f"),
    ("Class loss", "class loss (nats)", "class_loss", ".3f"),
    ("Token loss", "token loss (nats)", "token_loss", ".3f"),
    ("Top-1", "top-1 accuracy", "top1", ".1%"),
    ("Top-1 of the mean token", "token top-1 accuracy", "token_top1", ".1%"),
    ("Learning rate", "learning rate", "lr", ".2e"),
    ("Throughput", "images / s", "images_per_second", ".1f"),
)


@dataclass(frozen=True)
class RunReport:
    """What was written. warnings: what was left out, and why."""

    page: Path
    bytes: int
    examples: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of the table of results. better: 1 where more is better, −1 where less is, 0 where neither."""

    head: str
    value: Callable[[Run], float | None]
    form: Callable[[float], str]
    better: int = 0


COLUMNS = (
    Column("top-1", lambda run: run.result("top1"), "{:.2%}".format, 1),
    Column("top-5", lambda run: run.result("top5"), "{:.2%}".format, 1),
    Column("token top-1", lambda run: run.result("token_top1"), "{:.2%}".format, 1),
    Column("top-1, not averaged", lambda run: run.result("top1_not_averaged"), "{:.2%}".format, 1),
    # Losses of runs with and without token labels are not comparable: none is called the best.
    Column("loss", lambda run: run.result("loss"), "{:.3f}".format),
    Column("training", lambda run: run.total("seconds") or None, "{:,.0f} s".format),
    Column("images / s", lambda run: _throughput(run), "{:,.1f}".format, 1),
    Column("waiting for data", lambda run: _waiting(run), "{:.1%}".format, -1),
)


def report_runs(config: ReportConfig) -> RunReport:
    """Write the page.

    Raises:
        StlError: no run there, damaged files, images that do not fit, a page that does not fit into its size.
    """
    runs = read_runs(config.runs)
    warnings = [f"{run.name}: {note}" for run in runs for note in run.notes]
    warnings += [f"{run.name} is {run.status}" for run in runs if run.summary is None]
    sets = [open_label_set(place) for place in config.labels]
    predicted = _predict(runs, config, warnings)
    groups = example_groups(predicted[0], predicted[1], config.examples, config.seed) if predicted else []
    limit = config.max_mb * 1e6
    while True:
        groups = numbered(groups)
        page = _render(runs, groups, sets, warnings, config)
        if len(page) <= limit:
            break
        if not any(group.articles for group in groups):
            raise InputError(f"the page is {len(page) / 1e6:.1f} MB without examples; --max-mb allows more")
        groups = [group.without_last() for group in groups]
        text = f"Fewer examples than asked for are shown: more would not fit into {config.max_mb:g} MB (--max-mb)."
        warnings = [*(line for line in warnings if line != text), text]
    path = write_page(config.out, page)
    return RunReport(path, len(page), sum(len(group.articles) for group in groups), tuple(warnings))


def _predict(runs: Sequence[Run], config: ReportConfig, warnings: list[str]) -> tuple[list[Run], Predicted] | None:
    if config.data is None or config.examples == 0:
        return None
    able = [run for run in runs if (run.path / "weights.safetensors").is_file()]
    warnings += [f"{run.name} has no weights yet, and so no examples" for run in runs if run not in able]
    if not able:
        return None
    return able, predict(
        able,
        config.data,
        config.predict,
        skip_broken=config.skip_broken,
        device=config.device,
        workers=config.workers,
    )


def _render(
    runs: Sequence[Run],
    groups: Sequence[ExampleGroup],
    sets: Sequence[LabelSet],
    warnings: Sequence[str],
    config: ReportConfig,
) -> bytes:
    differ, same = setting_rows(runs)
    if len(runs) == 1:
        differ, same = [(name, [value]) for name, value in same], []
    names = ", ".join(run.name for run in runs)
    return render_page(
        "report.html",
        title=f"Report of {names}" if len(runs) < 4 else f"Report of {len(runs)} runs",
        shown=_shown(runs),
        warnings=warnings,
        results=_results(runs),
        runs=[
            {"name": run.name, "number": number % STYLES, "labels": _labels(run, sets)}
            for number, run in enumerate(runs)
        ],
        charts=_charts(runs),
        settings={"rows": differ, "same": same},
        examples={"groups": groups, "note": _examples_note(groups, config)},
        data=page_of(groups),
    )


def _shown(runs: Sequence[Run]) -> str:
    parts = [f"{run.name}: {run.stage}, {run.settings.get('model', 'model unknown')}, {run.status}" for run in runs]
    return "; ".join(parts) + "."


def _results(runs: Sequence[Run]) -> dict[str, Any]:
    columns = [column for column in COLUMNS if any(column.value(run) is not None for run in runs)]
    rows = [
        [{"text": run.name, "best": False}, {"text": f"{len(run.history)} of {run.epochs}", "best": False}]
        for run in runs
    ]
    for column in columns:
        values = [column.value(run) for run in runs]
        known = [value * column.better for value in values if value is not None]
        best = max(known) if column.better and len(set(known)) > 1 else None
        for row, value in zip(rows, values, strict=True):
            text = "–" if value is None else column.form(value)
            row.append({"text": text, "best": best is not None and value is not None and value * column.better == best})
    return {"heads": ["run", "epochs", *(column.head for column in columns)], "rows": rows}


def _charts(runs: Sequence[Run]) -> list[Chart]:
    charts = []
    for title, label, name, form in CURVES:
        series = [Series(run.name, number % STYLES, run.points(name)) for number, run in enumerate(runs)]
        chart = line_chart(title, "epoch", label, series, form)
        if chart is not None:
            charts.append(chart)
    return charts


def _labels(run: Run, sets: Sequence[LabelSet]) -> dict[str, str]:
    labels = run.data.get("labels")
    if not isinstance(labels, dict) or labels.get("kind", "none") == "none":
        if run.stage == "labeler":
            return {"labels": "none: a labeler learns from class labels, its tokens from their mean"}
        return {"labels": "none: the token head was not trained, and what its tokens say means nothing"}
    facts = {name: str(value) for name, value in labels.items() if not name.startswith("fingerprint")}
    fingerprints = labels.get("fingerprints") or [labels.get("fingerprint")]
    for position, fingerprint in enumerate(fingerprints, 1):
        prefix = f"set {position}: " if len(fingerprints) > 1 else ""
        known = next((each for each in sets if each.fingerprint == fingerprint), None)
        said = {"label set": known.place} | label_set_facts(known) if known else {"fingerprint": str(fingerprint)}
        facts |= {prefix + name: text for name, text in said.items() if fingerprint}
    return facts


def _examples_note(groups: Sequence[ExampleGroup], config: ReportConfig) -> str:
    if not groups:
        return "None: --data SRC names the images (such as the validation images) to show some of."
    return (
        f"From {config.data}. What the models say of each token, and of the whole. Point at a token, tap it, or go "
        "there with Tab and the arrow keys to see its most probable classes."
    )


def _throughput(run: Run) -> float | None:
    """Images a second over all epochs."""
    seconds = run.total("seconds")
    images = sum(
        rate * time
        for (_, rate), (_, time) in zip(run.points("images_per_second"), run.points("seconds"), strict=True)
        if rate is not None and time is not None
    )
    return images / seconds if seconds else None


def _waiting(run: Run) -> float | None:
    """The share of the time in which training waited for images."""
    seconds, known = run.total("seconds"), any(value is not None for _, value in run.points("data_wait_seconds"))
    return run.total("data_wait_seconds") / seconds if seconds and known else None
