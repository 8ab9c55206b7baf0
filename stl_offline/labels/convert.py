"""Converts a label set to another container or encoding, or divides it into other shards or parts of views."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from stl_offline.errors import InputError
from stl_offline.labels.arrays import ShardArrays, concatenate, join_parts, select, select_views
from stl_offline.labels.format import encode_shard
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import Manifest, shard_range
from stl_offline.labels.spec import PARTS, LabelSpec, q8_bounds
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
    views_per_part: int | None = None,
    workers: int = 0,
    **options: object,
) -> Manifest:
    """Write a label set in another form to ``out``. Continues a conversion that was interrupted.

    Changing the container, the shards or the parts, and converting from q8 to f16, is lossless: the same labels give
    the same bytes. From f16 to q8 each value changes within q8's error bounds, which are added to the manifest's.

    Args:
        label_set: a complete one.
        out: a new folder, or a URL that fsspec knows (``options`` go to it).
        container, encoding, format_version, shards: None keeps those of the set (for shards: the size of each).
            Where the set is in several parts, ``shards`` are of each part.
        views_per_part: how many consecutive views lie together, apart from the others; at least V puts all of them
            together. None keeps the set's parts. Several parts are of format version 2.
        workers: shards converted at the same time; 0 means one per core.

    Raises:
        InputError: a container or an encoding that is unknown, labels that the format version cannot hold, more shards
            than images, a set pulled in part.
        FormatError: the set is damaged.
        TargetError: ``out`` holds something else, or cannot be written.
    """
    if label_set.is_partial:
        raise InputError(f"only some shards of {label_set.place} are here; pull all of them before converting")
    old = label_set.spec
    sizes = [label_set.shards[index].samples for index in label_set.parts[0].present]
    if shards is not None:
        if not 1 <= shards <= len(label_set):
            raise InputError(f"`shards` must lie between 1 and the {len(label_set)} images, got {shards}")
        sizes = [last - first for first, last in (shard_range(i, shards, len(label_set)) for i in range(shards))]
    spec = _new_spec(old, container or old.container, encoding or old.encoding, len(sizes))
    spec = _divide(spec, views_per_part, format_version)
    is_copy = all(
        getattr(spec, name) == getattr(old, name) for name in ("container", "encoding", "format_version", "parts")
    )
    # Neighbours share a source shard of each part where shards are cut anew.
    read = lru_cache(maxsize=2 * len(label_set.parts))(label_set.read_shard)
    with LabelSetWriter(out, spec, sizes * len(spec.parts), options=options) as writer:
        todo = set(writer.todo())

        def write(number: int) -> None:
            """The shards of all parts that hold the same images, so that their source is read once."""
            first, last = writer.shard_range(number)
            sources = [list(_overlaps(part, first, last)) for part in label_set.parts]
            whole = _whole(label_set, sources[0])
            images = None if whole is None else label_set.shards[whole].images
            arrays: ShardArrays | None = None
            for part, views in enumerate(spec.parts):
                index = number + part * len(sizes)
                if index not in todo:
                    continue
                if is_copy and (source := _whole(label_set, sources[part])) is not None:
                    writer.write_encoded(index, label_set.read_whole(source), images)
                    continue
                if arrays is None:
                    arrays = join_parts(
                        [concatenate([select(read(source), rows) for source, rows in each]) for each in sources]
                    )
                writer.write_encoded(index, encode_shard(select_views(arrays, views), spec.of_views(views)), images)

        for _ in each_shard(write, sorted({index % len(sizes) for index in todo}), f"→ {out}", workers=workers):
            pass
        label_set.check_unique(label_set.present)
        return writer.finish()


def _new_spec(old: LabelSpec, container: str, encoding: str, num_shards: int) -> LabelSpec:
    # As a job would have written them that made this set at once.
    form = {"format": container, "encoding": encoding, "shards": num_shards}
    creation = old.creation | {name: value for name, value in form.items() if name in old.creation}
    bounds = q8_bounds(old.bounds) if (old.encoding, encoding) == ("f16", "q8") else old.bounds
    return replace(old, container=container, encoding=encoding, creation=creation, bounds=bounds)


def _divide(spec: LabelSpec, views_per_part: int | None, format_version: int | None) -> LabelSpec:
    """The spec with other parts and another version; None keeps what it has, as far as its version allows."""
    views, count = spec.views, spec.views_per_image
    if views_per_part is not None:
        if views_per_part < 1:
            raise InputError(f"`views_per_part` must be at least 1, got {views_per_part}")
        parts = [min(views_per_part, count - first) for first in range(0, count, views_per_part)]
        views = {name: value for name, value in views.items() if name != PARTS}
        views |= {PARTS: parts} if len(parts) > 1 else {}
    if format_version is None and PARTS not in views:
        format_version = spec.format_version
    return replace(spec, views=views, format_version=format_version)


def _whole(label_set: LabelSet, sources: list[tuple[int, slice]]) -> int | None:
    """The shard that holds these rows and no others."""
    (index, rows), *others = sources
    return None if others or rows != slice(0, label_set.shards[index].samples) else index


def _overlaps(part: LabelSet, first: int, last: int) -> Iterator[tuple[int, slice]]:
    """The shards that hold the samples [first, last) of a part, and which of their rows."""
    for index in part.present:
        shard = part.shards[index]
        start, stop = max(first, shard.first), min(last, shard.first + shard.samples)
        if start < stop:
            yield index, slice(start - shard.first, stop - shard.first)
