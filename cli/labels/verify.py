"""``stl-offline labels verify``."""

import click

from stl_offline.cli.options import example, machine_options


@click.command(epilog=example("stl-offline labels verify labels"))
@click.argument("path", metavar="SET")
@machine_options
def verify(path: str, workers: int, **_: object) -> None:
    """Read every shard: sizes, checksums, every value, keys unique in the whole set.

    Every fault is a line; the exit code is 1 where there is one.
    """
    from stl_offline.errors import FormatError
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.verify import verify as check

    report = check(open_label_set(path), workers=workers, found=click.echo)
    for note in report.notes:
        click.echo(f"note: {note}")
    if report.faults:
        raise FormatError(f"{path} has {len(report.faults):,} faults in {report.shards:,} shards; copy these anew")
    click.echo(f"{path}: all {report.shards:,} shards are whole ({report.samples:,} pictures)")
