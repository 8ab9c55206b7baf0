"""``stl-offline labels convert``."""

import click

from stl_offline.cli.labels.output import written_line
from stl_offline.cli.options import example, machine_options, option


@click.command(
    epilog=example(
        "stl-offline labels convert labels labels-tar --format webdataset",
        "stl-offline labels convert labels labels-small --encoding q8 --shards 8",
    )
)
@click.argument("path", metavar="SET")
@click.argument("out", metavar="OUT")
@option("--format", "container", metavar="NAME", help="Container: zarr or webdataset.  [default: as it is]")
@option("--encoding", metavar="NAME", help="f16, or q8, which is compact.  [default: as it is]")
@option("--shards", type=int, metavar="COUNT", help="Files of the new set.  [default: as it is]")
@machine_options
def convert(
    path: str, out: str, container: str | None, encoding: str | None, shards: int | None, workers: int, **_: object
) -> None:
    """Write a label set anew, in another container or encoding, or cut into other shards.

    Nothing is lost, except from f16 to q8, which moves probabilities within the bounds that the manifest states. A
    killed conversion goes on when the same command runs again.
    """
    from stl_offline.labels.convert import convert as write
    from stl_offline.labels.label_set import open_label_set

    manifest = write(open_label_set(path), out, container=container, encoding=encoding, shards=shards, workers=workers)
    click.echo(written_line(out, manifest))
