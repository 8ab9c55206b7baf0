"""What commands on label sets print when they are done."""

from typing import Any

from stl_offline.cli.output import ALREADY_COMPLETE, counted


def is_complete(place: str) -> bool:
    """Whether a label set lies there, so that the command that made it has nothing to do."""
    from stl_offline.errors import StlError
    from stl_offline.labels.label_set import open_label_set

    try:
        return not open_label_set(place).is_partial
    except StlError:
        return False


def written_line(out: str, manifest: Any, complete: bool) -> str:
    """Where a new label set lies and what it holds; ``complete``: it was there before the command."""
    spec, shards = manifest.spec, manifest.shards
    size = sum(shard.bytes for shard in shards)
    form = f"{counted(len(shards), 'shard')}, {spec.container}, {spec.encoding}"
    line = f"label set: {out} ({counted(spec.num_samples, 'image')} in {form}, {counted(size, 'byte')})"
    return f"{line}; {ALREADY_COMPLETE}" if complete else line


def transfer_line(place: str, done: Any, word: str) -> str:
    """What was transferred, and which shards are there now."""
    line = (
        f"label set: {place} ({counted(done.sent, 'shard')} {word}, {counted(done.sent_bytes, 'byte')}; "
        f"{done.kept:,} were there already"
    )
    if len(done.present) < done.shards:
        from stl_offline.labels.store import format_ranges

        line += f"; it holds the shards {format_ranges(done.present)} of {done.shards:,}"
    return f"{line})" if done.sent else f"{line}); {ALREADY_COMPLETE}"
