"""``stl-offline labels inspect``."""

import click

from stl_offline.cli.command import command, example, ignored
from stl_offline.cli.options import debug_option
from stl_offline.cli.output import counted
from stl_offline.cli.terminal import echo


@command(
    epilog=example("stl-offline labels inspect labels", "stl-offline labels inspect s3://bucket/labels"),
)
@click.argument("path", metavar="SET")
@debug_option
@ignored("--device", "--workers")
def inspect(path: str) -> None:
    """Print a summary of a label set: its images, labels, encoding, labeler and source."""
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.store import format_ranges

    label_set = open_label_set(path)
    spec = label_set.spec
    size = sum(shard.bytes for shard in label_set.shards)
    views = "whole images" if spec.views["kind"] == "whole" else f"{spec.views_per_image} crops of each image"
    lines = {
        "images": f"{spec.num_samples:,} in {counted(len(label_set.shards), 'shard')}, {counted(size, 'byte')}",
        "labels": f"{spec.grid[0]} × {spec.grid[1]} tokens, top {spec.top_k} of {spec.num_classes:,} classes, {views}",
        "encoding": f"{spec.encoding} ({spec.container})",
        "labeler": f"{spec.labeler['architecture']} ({spec.labeler['licence']})",
        "weights": spec.labeler["weights_sha256"],
        "input": f"{spec.preprocessing['height']} × {spec.preprocessing['width']} pixels",
        "source": f"keys' fingerprint {spec.source['fingerprint']}",
        "fingerprint": label_set.fingerprint,
    }
    if label_set.is_partial:
        lines["here"] = f"the shards {format_ranges(label_set.present)}, {counted(len(label_set), 'image')}"
    for name, text in lines.items():
        echo(f"{name + ':':<13}{text}")
