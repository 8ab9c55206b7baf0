"""``stl-offline labels merge``."""

import click

from stl_offline.cli.labels.output import written_line
from stl_offline.cli.options import example, machine_options


@click.command(epilog=example("stl-offline labels merge labels-a labels-b s3://team/labels-c labels"))
@click.argument("paths", metavar="SET SET...", nargs=-1, required=True)
@click.argument("out", metavar="OUT")
@machine_options
def merge(paths: tuple[str, ...], out: str, workers: int, **_: object) -> None:
    """Make one label set of several that were made with the same settings for different images.

    Shards are copied byte for byte. Settings that differ and keys that are there twice are refused by name. A killed
    merge goes on when the same command runs again.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.merge import merge as write

    manifest = write([open_label_set(path) for path in paths], out, workers=workers)
    click.echo(written_line(out, manifest))
