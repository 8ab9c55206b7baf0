"""What a label set says of itself, in words."""

from stl_offline.labels.label_set import LabelSet


def label_set_facts(label_set: LabelSet) -> dict[str, str]:
    """What a label set says of itself, for a page."""
    spec = label_set.spec
    views = "whole images" if spec.views["kind"] == "whole" else f"{spec.views_per_image} crops of each image"
    return {
        "images": f"{spec.num_samples:,} in {len(label_set.shards):,} shards, "
        f"{sum(shard.bytes for shard in label_set.shards):,} bytes",
        "labels": f"{spec.grid[0]} × {spec.grid[1]} tokens, top {spec.top_k} of {spec.num_classes:,} classes, {views}",
        "encoding": f"{spec.encoding} ({spec.container})",
        "labeler": f"{spec.labeler['architecture']} ({spec.labeler['licence']})",
        "weights": spec.labeler["weights_sha256"],
        "input": f"{spec.preprocessing['height']} × {spec.preprocessing['width']} pixels",
        "fingerprint": label_set.fingerprint,
    }
