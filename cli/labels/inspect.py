"""``stl-offline labels inspect``."""

import click

from stl_offline.cli.command import command, example, ignored
from stl_offline.cli.options import debug_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example("stl-offline labels inspect labels", "stl-offline labels inspect s3://bucket/labels"),
)
@click.argument("path", metavar="SET")
@debug_option
@ignored("--device", "--workers")
def inspect(path: str) -> None:
    """Print a summary of a label set: its images, labels, encoding, labeler and source."""
    from stl_offline.labels.card import summary
    from stl_offline.labels.label_set import open_label_set

    for name, text in summary(open_label_set(path)).items():
        echo(f"{name + ':':<13}{text}")
