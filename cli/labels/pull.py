"""``stl-offline labels pull``."""

import click

from stl_offline.cli.labels.output import transfer_line
from stl_offline.cli.options import example, machine_options, option


@click.command(
    epilog=example(
        "stl-offline labels pull s3://bucket/labels labels",
        "stl-offline labels pull hf://datasets/user/labels labels --shards 0-3,7",
    )
)
@click.argument("url", metavar="URL")
@click.argument("folder", metavar="DIR")
@option("--shards", metavar="LIST", help="Only these shards, such as 0-3,7.  [default: all]")
@machine_options
def pull(url: str, folder: str, shards: str | None, workers: int, **_: object) -> None:
    """Fetch a label set from an object store (or a folder), or only some of its shards.

    Each shard is compared with its checksum. What is there already is not fetched again, so the same command goes on
    after an interruption, and another one brings more shards.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.transfer import pull as fetch

    click.echo(transfer_line(folder, fetch(open_label_set(url), folder, shards=shards, workers=workers), "fetched"))
