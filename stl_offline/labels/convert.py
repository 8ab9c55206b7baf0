"""Converts a label set to another container, another encoding, or another number of shards."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from stl_offline.errors import InputError
from stl_offline.labels.arrays import concatenate, select
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import Manifest, ShardRecord, shard_range
from stl_offline.labels.spec import ENCODINGS, LabelSpec
from stl_offline.labels.store import each_shard
from stl_offline.labels.writer import LabelSetWriter


def convert(
    label_set: LabelSet,
    out: str | Path,
    *,
    container: str | None = None,
    encoding: str | None = None,
    format_version: int | None = None,
    shards: int | None = None,
    workers: int = 0,
    **options: object,
) -> Manifest:
    """Write a label set in another form to ``out``. Continues a conversion that was interrupted.

    Changing the container or the shards, and converting from q8 to f16, is lossless: the same labels give the same
    bytes. From f16 to q8 each value changes within q8's error bounds, which are added to those of the manifest.

    Args:
        label_set: a complete one.
        out: a new folder, or a URL that fsspec knows (``options`` go to it).
        container, encoding, format_version, shards: None keeps those of the set (for shards: the size of each).
        workers: shards converted at the same time; 0 means one per core.

    Raises:
        InputError: a container or an encoding that is unknown, labels that the format version cannot hold, more shards
            than images, a set pulled in part.
        FormatError: the set is damaged.
        TargetError: ``out`` holds something else, or cannot be written.
    """
    label_set.only_part()
    if label_set.is_partial:
        raise InputError(f"only some shards of {label_set.place} are here; pull all of them before converting")
    old = label_set.spec
    sizes = [shard.samples for shard in label_set.shards]
    if shards is not None:
        if not 1 <= shards <= len(label_set):
            raise InputError(f"`shards` must lie between 1 and the {len(label_set)} images, got {shards}")
        sizes = [last - first for first, last in (shard_range(i, shards, len(label_set)) for i in range(shards))]
    spec = _new_spec(old, container or old.container, encoding or old.encoding, len(sizes))
    if format_version is not None:
        spec = replace(spec, format_version=format_version)
    is_copy = all(getattr(spec, name) == getattr(old, name) for name in ("container", "encoding", "format_version"))
    # Neighbours share a source shard where shards are cut anew.
    read = lru_cache(maxsize=2)(label_set.read_shard)
    with LabelSetWriter(out, spec, sizes, options=options) as writer:

        def write(index: int) -> None:
            first, last = writer.shard_range(index)
            sources = list(_overlaps(label_set.shards, first, last))
            source, rows = sources[0]
            if is_copy and rows == slice(0, label_set.shards[source].samples) and len(sources) == 1:
                writer.write_encoded(index, label_set.read_whole(source))
            else:
                writer.write_shard(index, concatenate([select(read(source), rows) for source, rows in sources]))

        for _ in each_shard(write, writer.todo(), f"→ {out}", workers=workers):
            pass
        label_set.check_unique(label_set.present)
        return writer.finish()


def _new_spec(old: LabelSpec, container: str, encoding: str, num_shards: int) -> LabelSpec:
    # As a job would have written them that made this set at once.
    form = {"format": container, "encoding": encoding, "shards": num_shards}
    creation = old.creation | {name: value for name, value in form.items() if name in old.creation}
    bounds = dict(old.bounds)
    # What came from q8 lies on its steps, and goes back to them unchanged.
    if (old.encoding, encoding) == ("f16", "q8") and not ENCODINGS["q8"].keys() <= bounds.keys():
        for name, value in ENCODINGS[encoding].items():
            bounds[name] = bounds.get(name, 0.0) + value
    return replace(old, container=container, encoding=encoding, creation=creation, bounds=bounds)


def _overlaps(shards: Sequence[ShardRecord], first: int, last: int) -> Iterator[tuple[int, slice]]:
    """The shards that hold the samples [first, last), and which of their rows."""
    for index, shard in enumerate(shards):
        start, stop = max(first, shard.first), min(last, shard.first + shard.samples)
        if start < stop:
            yield index, slice(start - shard.first, stop - shard.first)
