"""``stl-offline labels verify``."""

import click

from stl_offline.cli.options import example, machine_options


@click.command(epilog=example("stl-offline labels verify labels"))
@click.argument("path", metavar="SET")
@machine_options
def verify(path: str, **_: object) -> None:
    """Read every shard: sizes, checksums, values in range."""
    from stl_offline.labels.label_set import open_label_set

    label_set = open_label_set(path)
    for shard in range(len(label_set.shards)):
        label_set.read_shard(shard)
    click.echo(f"{path}: all {len(label_set.shards):,} shards are whole")
