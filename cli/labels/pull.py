"""``stl-offline labels pull``."""

import click

from stl_offline.cli.command import command, example, ignored, option
from stl_offline.cli.labels.output import transfer_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels pull s3://bucket/labels labels",
        "stl-offline labels pull hf://datasets/user/labels labels --shards 0-3,7",
        "stl-offline labels pull s3://bucket/labels labels --views 0-9",
    )
)
@click.argument("url", metavar="URL")
@click.argument("folder", metavar="DIR")
@option("--shards", group="labels", metavar="LIST", show_default="all", help="Shards to fetch, such as 0-3,7.")
@option(
    "--views",
    group="labels",
    metavar="LIST",
    show_default="all",
    help="Views to fetch, such as 0-9, of a set in parts (labels merge --views, labels convert --views-per-part).",
)
@workers_option
@debug_option
@ignored("--device")
def pull(url: str, folder: str, shards: str | None, views: str | None, workers: int) -> None:
    """Fetch a label set, or some of its shards or views, from an object store or a folder.

    Each shard is compared with its checksum. Shards that are present are not fetched again, so the same command
    continues after an interruption, and a later one can add shards.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.transfer import pull as fetch

    done = fetch(open_label_set(url), folder, shards=shards, views=views, workers=workers)
    echo(transfer_line(folder, done, "fetched"))
