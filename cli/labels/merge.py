"""``stl-offline labels merge``."""

import click

from stl_offline.cli.command import command, example, ignored
from stl_offline.cli.labels.output import is_complete, written_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(epilog=example("stl-offline labels merge labels-a labels-b s3://team/labels-c labels"))
@click.argument("paths", metavar="SET SET...", nargs=-1, required=True)
@click.argument("out", metavar="OUT")
@workers_option
@debug_option
@ignored("--device")
def merge(paths: tuple[str, ...], out: str, workers: int) -> None:
    """Merge several label sets that were made with the same settings from different images.

    Shards are copied byte for byte. Differing settings and keys that occur twice are errors that name them. An
    interrupted merge continues when the same command runs again.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.merge import merge as write

    label_sets, complete = [open_label_set(path) for path in paths], is_complete(out)
    echo(written_line(out, write(label_sets, out, workers=workers), complete))
