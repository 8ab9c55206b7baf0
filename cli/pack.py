"""``stl-offline pack``."""

import click

from stl_offline.cli.options import example, machine_options


@click.command(
    epilog=example("stl-offline pack pictures/train train.beton", "stl-offline pack 'train-{000..015}.tar' train.beton")
)
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DEST")
@click.option(
    "--max-size", type=click.IntRange(min=1), metavar="N", help="Shrink pictures whose longer side exceeds N pixels."
)
@click.option("--skip-broken", is_flag=True, help="Leave out and list pictures that cannot be decoded.")
@machine_options
def pack(source: str, destination: str, max_size: int | None, skip_broken: bool, workers: int, **_: object) -> None:
    """Pack the pictures of SRC into the file DEST (.beton) for fast loading.

    RGB JPEGs are stored byte for byte; other pictures become RGB. The keys, class names and content hashes go into the
    same file. Commands that are given pictures do this by themselves and keep the file in a cache.
    """
    from stl_offline.images.pack import pack as pack_pictures

    report = pack_pictures(source, destination, max_size=max_size, skip_broken=skip_broken, workers=workers or None)
    click.echo(
        f"packed {report.samples:,} pictures of {report.classes:,} classes into {report.path} "
        f"({report.bytes:,} bytes): {report.stored_as_is:,} as they were, "
        f"{report.converted:,} converted, {len(report.skipped):,} skipped"
    )
    for key in report.skipped:
        click.echo(f"skipped {key}")
