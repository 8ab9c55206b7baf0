"""What commands on label sets print when they are done."""

from typing import Any


def written_line(out: str, manifest: Any) -> str:
    """Where a new label set lies and what it holds."""
    spec, shards = manifest.spec, manifest.shards
    size = sum(shard.bytes for shard in shards)
    form = f"{len(shards):,} shards, {spec.container}, {spec.encoding}"
    return f"label set: {out} ({spec.num_samples:,} images in {form}, {size:,} bytes)"


def transfer_line(place: str, done: Any, word: str) -> str:
    """What went where, and which shards are there now."""
    line = (
        f"label set: {place} ({done.sent:,} shards {word}, {done.sent_bytes:,} bytes; {done.kept:,} were there already"
    )
    if len(done.present) < done.shards:
        from stl_offline.labels.store import format_ranges

        line += f"; it holds the shards {format_ranges(done.present)} of {done.shards:,}"
    return f"{line})"
