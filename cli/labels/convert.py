"""``stl-offline labels convert``."""

from typing import Any

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.labels.output import is_complete, written_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels convert labels labels-tar --format webdataset",
        "stl-offline labels convert labels labels-small --encoding q8 --shards 8",
        "stl-offline labels convert labels-30-views labels-by-view --views-per-part 1",
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
    "--format-version",
    group="labels",
    type=int,
    metavar="N",
    show_default="that of SET",
    help="Format version of the new set: 1, or 2, whose tars hold plain .npz files that more programs read.",
)
@option(
    "--shards",
    group="labels",
    type=int,
    metavar="N",
    show_default="that of SET",
    help="Number of shards of the new set, or of each of its parts.",
)
@option(
    "--views-per-part",
    group="labels",
    type=int,
    metavar="N",
    show_default="the parts of SET",
    help="Divide the views into parts of N, each with shards of its own, so that training and labels pull --views read "
    "only the views they need.",
)
@workers_option
@debug_option
@ignored("--device")
def convert(path: str, out: str, **options: Any) -> None:
    """Write a label set in another container or encoding, or divided into other shards or parts of views.

    Nothing is lost, except from f16 to q8, which changes probabilities within the bounds in the manifest. An
    interrupted conversion continues when the same command runs again.
    """
    from stl_offline.labels.convert import convert as write
    from stl_offline.labels.label_set import open_label_set

    label_set, complete = open_label_set(path), is_complete(out)
    manifest = write(label_set, out, **options)
    echo(written_line(out, manifest, complete))
