"""``stl-offline demo``."""

import click

from stl_offline.cli.options import example, machine_options, option


@click.command(epilog=example("stl-offline demo --out runs/demo"))
@option("--out", default="runs/demo", metavar="DIR", help="Folder for everything that the demo makes.")
@option("--train", default=1600, metavar="N", help="Training images to draw.")
@option("--val", default=300, metavar="N", help="Validation images to draw.")
@option("--epochs", default=5, metavar="N", help="Of each training stage.")
@option("--shards", default=4, metavar="N", help="Files of the label set.")
@option("--seed", default=0, metavar="N", help="Of the images and of every stage.")
@machine_options
def demo(debug: bool, **options: object) -> None:
    """All stages on drawn images: train a labeler, dump its token labels, train students, show what happened.

    Ends with a table of each stage's time and accuracy, a page of its labels and a report of its runs.
    """
    from stl_offline.demo import run_demo

    click.echo(run_demo(**options))
