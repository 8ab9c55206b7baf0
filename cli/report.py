"""``stl-offline report``."""

import click

from stl_offline.cli.command import command, example, option
from stl_offline.cli.options import SOURCE_HELP, debug_option, device_option, skip_broken_option, workers_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo
from stl_offline.config import ReportConfig


@command(
    epilog=example(
        "stl-offline report runs/student --data images/val",
        "stl-offline report runs/student runs/baseline --data images/val --labels labels --out report.html",
    )
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@option(
    "--data",
    group="data",
    metavar="SRC",
    show_default="no examples",
    help=f"Images to show examples of: {SOURCE_HELP}.",
)
@option(
    "--examples",
    group="data",
    default=ReportConfig.examples,
    metavar="N",
    help="Correctly classified images to show, and as many wrongly classified ones.",
)
@option("--predict", group="data", default=ReportConfig.predict, metavar="N", help="Images to choose examples from.")
@skip_broken_option
@option("--seed", group="data", default=ReportConfig.seed, metavar="N", help="Seed of the choice of examples.")
@option(
    "--labels",
    group="labels",
    multiple=True,
    metavar="SET",
    help="Label set that a run was trained with. May be given several times.",
)
@option("--out", group="output", default=ReportConfig.out, metavar="FILE", help="File to write the page to.")
@option(
    "--max-mb",
    group="output",
    default=ReportConfig.max_mb,
    metavar="X",
    help="Maximum size of the page, in megabytes.",
)
@device_option
@workers_option
@debug_option
def report(**settings: object) -> None:
    """Compare runs on one page: curves, results, differing settings, labels, and examples with token predictions.

    The page is one self-contained file. Runs may be unfinished; damaged files of a run are listed.
    """
    config = ReportConfig(**settings)
    from stl_offline.reports.report import report_runs

    done = report_runs(config)
    for warning in done.warnings:
        echo(f"note: {warning}", err=True)
    echo(f"page: {done.page} ({counted(done.examples, 'example')}, {counted(done.bytes, 'byte')})")
