"""``stl-offline demo``."""

import click

from stl_offline.cli.options import example, machine_options, option


@click.command(epilog=example("stl-offline demo --out runs/demo"))
@option("--out", default="runs/demo", metavar="DIR", help="Folder for everything that the demo makes.")
@machine_options
def demo(out: str, device: str, workers: int, **_: object) -> None:
    """All stages on an embedded data set: train a labeler, dump its token labels, train students, show what happened.

    Ends with a table of each stage's time and accuracy, and a picture of label maps.
    """
    from stl_offline.demo import run_demo

    click.echo(run_demo(out, device=device, workers=workers))
