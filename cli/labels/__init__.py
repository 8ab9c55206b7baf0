"""``stl-offline labels``: look at label sets, check them, change their form and share them."""

import click

from stl_offline.cli.command import example
from stl_offline.cli.lazy import lazy_group

COMMANDS = {
    "inspect": ("stl_offline.cli.labels.inspect:inspect", "Print a summary of a label set."),
    "stats": ("stl_offline.cli.labels.stats:stats", "Measure confidence, residual and agreement."),
    "preview": ("stl_offline.cli.labels.preview:preview", "Show labels on a page and in PNG files."),
    "verify": ("stl_offline.cli.labels.verify:verify", "Check every shard, or compare with a labeler."),
    "convert": ("stl_offline.cli.labels.convert:convert", "Change container, encoding or shard count."),
    "merge": ("stl_offline.cli.labels.merge:merge", "Merge several label sets into one."),
    "push": ("stl_offline.cli.labels.push:push", "Send a label set to an object store."),
    "pull": ("stl_offline.cli.labels.pull:pull", "Fetch a label set, or some of its shards."),
}


@click.group(
    cls=lazy_group(COMMANDS),
    epilog=example("stl-offline labels inspect labels", "stl-offline labels pull s3://bucket/labels labels"),
)
def labels() -> None:
    """Look at label sets, check them, change their form and share them.

    A label set (SET) is a folder, or an address in an object store: s3://bucket/labels, gs://bucket/labels,
    hf://datasets/user/labels. Only preview --data, stats --masks and verify --recompute need torch and FFCV.
    """
