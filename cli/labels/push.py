"""``stl-offline labels push``."""

import click

from stl_offline.cli.command import command, example, ignored
from stl_offline.cli.labels.output import transfer_line
from stl_offline.cli.options import debug_option, workers_option
from stl_offline.cli.terminal import echo


@command(
    epilog=example(
        "stl-offline labels push labels s3://bucket/labels",
        "stl-offline labels push labels hf://datasets/user/labels",
    )
)
@click.argument("path", metavar="SET")
@click.argument("url", metavar="URL")
@workers_option
@debug_option
@ignored("--device")
def push(path: str, url: str, workers: int) -> None:
    """Send a label set to an object store or a folder, the manifest last.

    Each object is read back and compared. Shards that are present are not sent again, so the same command continues
    after an interruption. Credentials and endpoints come from the store's own environment variables, such as
    AWS_PROFILE and AWS_ENDPOINT_URL.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.transfer import push as send

    echo(transfer_line(url, send(open_label_set(path), url, workers=workers), "sent"))
