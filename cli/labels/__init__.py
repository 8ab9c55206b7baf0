"""``stl-offline labels``: look at label sets, check them, change their form and share them."""

import click

from stl_offline.cli.lazy import lazy_group
from stl_offline.cli.options import example

COMMANDS = {
    "inspect": ("stl_offline.cli.labels.inspect:inspect", "Print what a label set says of itself."),
    "preview": ("stl_offline.cli.labels.preview:preview", "Look at labels: a page and pictures."),
    "verify": ("stl_offline.cli.labels.verify:verify", "Check every shard, or label a sample again."),
}


@click.group(
    cls=lazy_group(COMMANDS),
    epilog=example("stl-offline labels inspect labels", "stl-offline labels verify labels"),
)
def labels() -> None:
    """Look at label sets, check them, change their form and share them.

    A label set (SET) is a folder, or an address in an object store such as s3://bucket/labels. Needs neither torch nor
    FFCV.
    """
