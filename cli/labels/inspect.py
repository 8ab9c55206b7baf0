"""``stl-offline labels inspect``."""

import click

from stl_offline.cli.options import example, machine_options


@click.command(
    epilog=example("stl-offline labels inspect labels", "stl-offline labels inspect s3://bucket/labels"),
)
@click.argument("path", metavar="SET")
@machine_options
def inspect(path: str, **_: object) -> None:
    """Print what a label set says of itself."""
    from stl_offline.labels.label_set import open_label_set
    from stl_offline.labels.store import format_ranges

    label_set = open_label_set(path)
    spec = label_set.spec
    size = sum(shard.bytes for shard in label_set.shards)
    views = "whole images" if spec.views["kind"] == "whole" else f"{spec.views_per_image} crops of each image"
    lines = {
        "images": f"{spec.num_samples:,} in {len(label_set.shards):,} shards, {size:,} bytes",
        "labels": f"{spec.grid[0]} × {spec.grid[1]} tokens, top {spec.top_k} of {spec.num_classes:,} classes, {views}",
        "encoding": f"{spec.encoding} ({spec.container})",
        "labeler": f"{spec.labeler['architecture']} ({spec.labeler['licence']})",
        "weights": spec.labeler["weights_sha256"],
        "input": f"{spec.preprocessing['height']} × {spec.preprocessing['width']} pixels",
        "source": f"keys' fingerprint {spec.source['fingerprint']}",
        "fingerprint": label_set.fingerprint,
    }
    if label_set.is_partial:
        lines["here"] = f"the shards {format_ranges(label_set.present)}, {len(label_set):,} images"
    for name, text in lines.items():
        click.echo(f"{name + ':':<13}{text}")
