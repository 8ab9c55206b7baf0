"""``stl-offline report``: one page about one run, or several side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stl_offline.config import ReportConfig
from stl_offline.errors import InputError
from stl_offline.files import check_place_of_file
from stl_offline.labels.card import summary
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.reports.charts import DASHES, Chart, Series, line_chart
from stl_offline.reports.examples import Examples, make_examples
from stl_offline.reports.html import render_page, write_page
from stl_offline.reports.predictions import predict
from stl_offline.reports.runs import FINE_TUNED, Run, read_runs, setting_rows

# Title, axis label with its unit, name in the log, format of its values.
CURVES = (
    ("Loss", "loss (nats)", "loss", ".3f"),
    ("Class loss", "class loss (nats)", "class_loss", ".3f"),
    ("Token loss", "token loss (nats)", "token_loss", ".3f"),
    ("Top-1", "top-1 accuracy", "top1", ".1%"),
    ("Top-1 of the mean token", "token top-1 accuracy", "token_top1", ".1%"),
    ("mIoU", "mean IoU", "miou", ".1%"),
    ("mAP", "mean AP at IoU 0.50 to 0.95", "map", ".1%"),
    ("Learning rate", "learning rate", "lr", ".2e"),
    ("Throughput", "images / s", "images_per_second", ".1f"),
)


@dataclass(frozen=True)
class RunReport:
    """What was written. warnings: what was left out and why."""

    page: Path
    bytes: int
    examples: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    """A column of the table of results. better: 1 where higher is better, −1 where lower is, 0 for neither."""

    head: str
    value: Callable[[Run], float | None]
    form: Callable[[float], str]
    better: int = 0


# Head, and name in the summary, of the scores that are shares; higher is better.
SHARES = (
    ("top-1", "top1"),
    ("top-5", "top5"),
    ("token top-1", "token_top1"),
    ("top-1, not averaged", "top1_not_averaged"),
    ("mIoU", "miou"),
    ("mIoU, not averaged", "miou_not_averaged"),
    ("mean accuracy", "mean_accuracy"),
    ("pixel accuracy", "pixel_accuracy"),
    ("mAP", "map"),
    ("mAP, not averaged", "map_not_averaged"),
    ("AP at IoU 0.50", "map_50"),
    ("mAP of masks", "mask_map"),
)
COLUMNS = (
    *(Column(head, partial(Run.result, name=name), "{:.2%}".format, 1) for head, name in SHARES),
    # Losses of runs with and without token labels are not comparable, so none is marked as the best.
    Column("loss", lambda run: run.result("loss"), "{:.3f}".format),
    Column("training", lambda run: run.total("seconds") or None, "{:,.0f} s".format),
    Column("images / s", lambda run: _throughput(run), "{:,.1f}".format, 1),
    Column("waiting for data", lambda run: _waiting(run), "{:.1%}".format, -1),
)


def report_runs(config: ReportConfig) -> RunReport:
    """Write the page.

    Raises:
        StlError: a folder holds no run, files are damaged, images do not belong to the runs, or the page exceeds
            ``config.max_mb`` even without examples.
    """
    check_place_of_file(config.out)
    runs = read_runs(config.runs)
    warnings = [f"{run.name}: {note}" for run in runs for note in run.notes]
    warnings += [f"{run.name} is {run.status}" for run in runs if run.summary is None]
    sets = [open_label_set(place) for place in config.labels]
    used = {fingerprint for run in runs for fingerprint in _fingerprints(run)}
    warnings += [f"{each.place}: none of the runs was trained on it" for each in sets if each.fingerprint not in used]
    if len(runs) > len(DASHES):
        warnings.append(
            f"run {len(DASHES) + 1} and later ones repeat the lines of earlier ones; point at a dot for its run"
        )
    values = _page_values(runs, sets)
    examples = _make_examples(runs, config, warnings)
    limit = config.max_mb * 1e6
    cut: tuple[str, ...] = ()
    while True:
        shown = {"groups": examples.groups, "note": _examples_note(examples, config)}
        page = render_page("report.html", warnings=(*warnings, *cut), examples=shown, data=examples.data, **values)
        if len(page) <= limit:
            break
        if not examples.groups:
            raise InputError(
                f"the page takes {len(page) / 1e6:.1f} MB without examples, more than the {config.max_mb:g} MB "
                "allowed; increase `max_mb`"
            )
        examples = examples.shorter()
        cut = (f"Fewer examples than requested are shown: more would exceed the maximum size of {config.max_mb:g} MB.",)
    path = write_page(config.out, page)
    return RunReport(path, len(page), len(examples.articles), (*warnings, *cut))


def _make_examples(runs: Sequence[Run], config: ReportConfig, warnings: list[str]) -> Examples:
    if config.data is None or config.examples == 0:
        return Examples()
    known = [run for run in runs if (run.path / "weights.safetensors").is_file()]
    warnings += [f"{run.name} has no weights yet and is left out of the examples" for run in runs if run not in known]
    able = [run for run in known if run.stage not in FINE_TUNED]
    warnings += [
        f"{run.name} is a {run.stage} and is left out of the examples, which show predicted classes of images"
        for run in known
        if run not in able
    ]
    if not able:
        return Examples()
    predicted = predict(
        able,
        config.data,
        config.predict,
        skip_broken=config.skip_broken,
        device=config.device,
        workers=config.workers,
    )
    return make_examples(able, predicted, config.examples, config.seed)


def _page_values(runs: Sequence[Run], sets: Sequence[LabelSet]) -> dict[str, Any]:
    """What the template ``report.html`` shows, besides warnings and examples."""
    differ, same = setting_rows(runs)
    if len(runs) == 1:
        differ, same = [(name, [value]) for name, value in same], []
    names = ", ".join(run.name for run in runs)
    return {
        "title": f"Report of {names}" if len(runs) < 4 else f"Report of {len(runs)} runs",
        "shown": _shown(runs),
        "results": _results(runs),
        "runs": [
            {
                "name": run.name,
                "color": f"var(--s{number % len(DASHES)})",
                "dashes": " ".join(map(str, DASHES[number % len(DASHES)])),
                "labels": _labels(run, sets),
            }
            for number, run in enumerate(runs)
        ],
        "charts": _charts(runs),
        "settings": {"rows": differ, "same": same},
    }


def _shown(runs: Sequence[Run]) -> str:
    parts = [f"{run.name}: {run.stage}, {run.model}, {run.status}" for run in runs]
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
        series = [Series(run.name, number % len(DASHES), run.measured(name)) for number, run in enumerate(runs)]
        chart = line_chart(title, "epoch", label, series, form)
        if chart is not None:
            charts.append(chart)
    return charts


def _fingerprints(run: Run) -> list[Any]:
    """Of the label sets that a run was trained on; None for labels of another kind."""
    labels = run.data.get("labels")
    return (labels.get("fingerprints") or [labels.get("fingerprint")]) if isinstance(labels, dict) else []


def _labels(run: Run, sets: Sequence[LabelSet]) -> dict[str, str]:
    labels = run.data.get("labels")
    if not isinstance(labels, dict) or labels.get("kind", "none") == "none":
        if run.stage == "labeler":
            how = {"mean": "their mean", "lme": "the log of their mean exponential"}
            through = how.get(run.settings.get("token_pool", "mean"), "a pool of them")
            tokens = f"its tokens through {through}" if run.settings.get("token_weight", 1) else "its tokens not at all"
            return {"labels": f"none: a labeler is trained on class labels, {tokens}"}
        if run.stage in FINE_TUNED:
            return {"labels": "none: a backbone is fine-tuned on masks or boxes"}
        return {"labels": "none: the token head was not trained, so its token predictions are meaningless"}
    facts = {name: str(value) for name, value in labels.items() if not name.startswith("fingerprint")}
    fingerprints = _fingerprints(run)
    for position, fingerprint in enumerate(fingerprints, 1):
        prefix = f"set {position}: " if len(fingerprints) > 1 else ""
        known = next((each for each in sets if each.fingerprint == fingerprint), None)
        found = {"label set": known.place} | summary(known) if known else {"fingerprint": str(fingerprint)}
        facts |= {prefix + name: text for name, text in found.items() if fingerprint}
    return facts


def _examples_note(examples: Examples, config: ReportConfig) -> str:
    if config.data is None or config.examples == 0:
        return "None: the report was made without images to show examples of, such as the validation images."
    if not examples.groups:
        return "None: the warnings at the top of this page say why."
    return (
        f"From {config.data}. Predictions for the whole image and for each of its tokens. Point at a token, tap it, or "
        "move to it with Tab and the arrow keys to see its most probable classes."
    )


def _throughput(run: Run) -> float | None:
    """Images per second over all epochs."""
    seconds = run.total("seconds")
    images = sum(
        rate * time
        for (_, rate), (_, time) in zip(run.points("images_per_second"), run.points("seconds"), strict=True)
        if rate is not None and time is not None
    )
    return images / seconds if seconds else None


def _waiting(run: Run) -> float | None:
    """Share of the training time spent waiting for images."""
    seconds, known = run.total("seconds"), any(value is not None for _, value in run.points("data_wait_seconds"))
    return run.total("data_wait_seconds") / seconds if seconds and known else None
