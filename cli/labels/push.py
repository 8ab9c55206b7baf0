"""``stl-offline labels push``."""

import click

from stl_offline.cli.labels.output import transfer_line
from stl_offline.cli.options import example, machine_options


@click.command(
    epilog=example(
        "stl-offline labels push labels s3://bucket/labels",
        "stl-offline labels push labels hf://datasets/user/labels",
    )
)
@click.argument("path", metavar="SET")
@click.argument("url", metavar="URL")
@machine_options
def push(path: str, url: str, workers: int, **_: object) -> None:
    """Send a label set to an object store (or a folder), the manifest last.

    Each object is read back and compared. What is there already is not sent again, so the same command goes on after
    an interruption. Credentials and endpoints come from the store's own environment, such as AWS_PROFILE and
    AWS_ENDPOINT_URL.
    """
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.transfer import push as send

    click.echo(transfer_line(url, send(open_label_set(path), url, workers=workers), "sent"))
