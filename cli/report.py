"""``stl-offline report``."""

import click

from stl_offline.cli.options import SOURCE_HELP, example, machine_options, option
from stl_offline.config import ReportConfig


@click.command(
    epilog=example(
        "stl-offline report runs/student --data images/val",
        "stl-offline report runs/student runs/baseline --data images/val --labels labels --out report.html",
    )
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@option("--data", metavar="SRC", help=f"Images to show examples of: {SOURCE_HELP}.  [default: no examples]")
@option("--labels", multiple=True, metavar="SET", help="A label set that a run learned from; may be repeated.")
@option("--out", default=ReportConfig.out, metavar="FILE", help="The page.")
@option("--examples", default=ReportConfig.examples, metavar="N", help="Right ones, and as many wrong ones.")
@option("--predict", default=ReportConfig.predict, metavar="N", help="Images that these are chosen from.")
@option("--seed", default=ReportConfig.seed, metavar="N", help="Of the choice.")
@option("--max-mb", default=ReportConfig.max_mb, metavar="X", help="Largest page, in megabytes.")
@machine_options
def report(**options: object) -> None:
    """Compare runs on one page: curves, results, settings that differ, labels, and examples with token predictions.

    The page is one file that needs nothing else. Runs may be unfinished; what is broken in their files is said.
    """
    config = ReportConfig(**options)
    from stl_offline.reports.report import report_runs

    done = report_runs(config)
    for warning in done.warnings:
        click.echo(f"note: {warning}", err=True)
    click.echo(f"page: {done.page} ({done.examples} examples, {done.bytes:,} bytes)")
