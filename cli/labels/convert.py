"""``stl-offline labels convert``."""

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.labels.output import is_complete, written_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels convert labels labels-tar --format webdataset",
        "stl-offline labels convert labels labels-small --encoding q8 --shards 8",
    )
)
@click.argument("path", metavar="SET")
@click.argument("out", metavar="OUT")
@option(
    "--format",
    "container",
    group="labels",
    metavar="NAME",
    show_default="that of SET",
    help="Container of the new set: zarr or webdataset.",
)
@option(
    "--encoding",
    group="labels",
    metavar="NAME",
    show_default="that of SET",
    help="Encoding of the new set: f16, or q8, which is smaller.",
)
@option(
    "--shards",
    group="labels",
    type=int,
    metavar="N",
    show_default="that of SET",
    help="Number of shards of the new set.",
)
@workers_option
@debug_option
@ignored("--device")
def convert(path: str, out: str, container: str | None, encoding: str | None, shards: int | None, workers: int) -> None:
    """Write a label set in another container or encoding, or with another number of shards.

    Nothing is lost, except from f16 to q8, which changes probabilities within the bounds in the manifest. An
    interrupted conversion continues when the same command runs again.
    """
    from stl_offline.labels.convert import convert as write
    from stl_offline.labels.label_set import open_label_set

    label_set, complete = open_label_set(path), is_complete(out)
    manifest = write(label_set, out, container=container, encoding=encoding, shards=shards, workers=workers)
    echo(written_line(out, manifest, complete))
