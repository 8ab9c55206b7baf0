"""``stl-offline labels``: look at label sets, check them, change their form and share them."""

import click

from stl_offline.cli.lazy import lazy_group
from stl_offline.cli.options import example

COMMANDS = {
    "inspect": ("stl_offline.cli.labels.inspect:inspect", "Print what a label set says of itself."),
    "stats": ("stl_offline.cli.labels.stats:stats", "Measure confidence, residual and agreement."),
    "preview": ("stl_offline.cli.labels.preview:preview", "Look at labels: a page and images."),
    "verify": ("stl_offline.cli.labels.verify:verify", "Check every shard, or label a sample again."),
    "convert": ("stl_offline.cli.labels.convert:convert", "Change container, encoding or shard count."),
    "merge": ("stl_offline.cli.labels.merge:merge", "Make one label set of several."),
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
    hf://datasets/user/labels. Needs neither torch nor FFCV, but for preview --data and verify --recompute.
    """
