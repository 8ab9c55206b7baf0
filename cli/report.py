"""``stl-offline report``."""

import click

from stl_offline.cli.command import command, example, setting_option
from stl_offline.cli.options import SOURCE_HELP, debug_option, device_option, skip_broken_option, workers_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo
from stl_offline.config import ReportConfig


@command(
    epilog=example(
        "stl-offline report runs/student --data images/val",
        "stl-offline report runs/student runs/baseline --data images/val --labels labels --out report.html",
        "stl-offline report fan.json resnet50.json --out robustness.html",
    )
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...|FILE.json...")
@setting_option(ReportConfig, "--data", group="data", metavar="SRC", show_default="no examples", more=SOURCE_HELP)
@setting_option(ReportConfig, "--examples", group="data", metavar="N")
@setting_option(ReportConfig, "--predict", group="data", metavar="N")
@skip_broken_option
@setting_option(ReportConfig, "--seed", group="data", metavar="N")
@setting_option(ReportConfig, "--labels", group="labels", multiple=True, metavar="SET")
@setting_option(ReportConfig, "--out", group="output", metavar="FILE")
@setting_option(ReportConfig, "--max-mb", group="output", metavar="X")
@device_option
@workers_option
@debug_option
def report(**settings: object) -> None:
    """Compare runs on one page: curves, results, differing settings, labels, and examples with token predictions.

    The page is one self-contained file. Runs may be unfinished; damaged files of a run are listed. Files that hold what
    evaluate --json printed, for suites or corruptions, give a page of scores instead: models side by side.
    """
    config = ReportConfig(**settings)
    if config.of_scores:
        from stl_offline.reports.scores import report_scores

        page = report_scores(config)
        echo(f"page: {page.page} ({counted(len(config.runs), 'model')}, {counted(page.bytes, 'byte')})")
        return
    from stl_offline.reports.report import report_runs

    done = report_runs(config)
    for warning in done.warnings:
        echo(f"note: {warning}", err=True)
    echo(f"page: {done.page} ({counted(done.examples, 'example')}, {counted(done.bytes, 'byte')})")
