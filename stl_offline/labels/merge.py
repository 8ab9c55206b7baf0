"""Merges label sets that were made with the same settings for different images, or views of the same images.

Shards are copied byte for byte and renumbered in the order of the sets. A new manifest is written.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stl_offline.errors import InputError, JoinError, counted
from stl_offline.files import images_fingerprint
from stl_offline.labels.families import in_view_order
from stl_offline.labels.format import encode_shard
from stl_offline.labels.keys import find_duplicates, some
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.spec import OWN_CLASSES, PARTS, LabelSpec, differences, widest_bounds
from stl_offline.labels.store import each_shard
from stl_offline.labels.writer import LabelSetWriter

# What sets that are merged need not share: which images, how the job was run, and how far rounding went (conversions).
_OWN = ("source", "creation", "bounds")


@dataclass(frozen=True)
class _Part:
    """One shard of the merged set, and where it comes from."""

    label_set: LabelSet
    index: int
    keys: bytes  # as JSON, without its brackets
    hashes: np.ndarray
    class_ids: bytes
    content_hashes: bytes


def merge(label_sets: Sequence[LabelSet], out: str | Path, *, workers: int = 0, **options: object) -> Manifest:
    """Write the shards of several label sets as one set to ``out``. Continues a merge that was interrupted.

    Args:
        label_sets: two or more. Of a partial set, the shards that are present are merged.
        out: a new folder, or a URL that fsspec knows (``options`` go to it).
        workers: shards in memory at the same time; 0 means one per core.

    Raises:
        InputError: settings differ (the message names them, with both values), or there are fewer than two sets.
        JoinError: a key occurs twice (the message counts such keys and names examples).
        FormatError: a set is damaged.
        TargetError: ``out`` holds something else, or cannot be written.
    """
    if len(label_sets) < 2:
        raise InputError(f"merging takes two label sets or more, got {len(label_sets)}")
    for other in label_sets[1:]:
        _check_settings(label_sets[0].only_part(), other.only_part())
    parts = _read_parts(label_sets, workers)
    _check_keys(parts)
    sizes = [len(part.hashes) for part in parts]
    spec = replace(
        label_sets[0].spec,
        source=_source(label_sets[0].spec, sum(sizes), _fingerprint(label_sets[0].spec, parts)),
        creation=_shared([each.spec.creation for each in label_sets]),
        bounds=widest_bounds([each.spec for each in label_sets]),
    )
    with LabelSetWriter(out, spec, sizes, options=options) as writer:
        todo = writer.todo()

        def copy(position: int) -> None:
            part = parts[position]
            images = part.label_set.shards[part.index].images
            writer.write_encoded(position, part.label_set.read_whole(part.index), images)

        for _ in each_shard(copy, todo, f"→ {out}", workers=workers):
            pass
        return writer.finish()


def merge_views(label_sets: Sequence[LabelSet], out: str | Path, *, workers: int = 0, **options: object) -> Manifest:
    """Write the shards of sets with different views of the same images as one set to ``out``, in the views' order.

    Continues a merge that was interrupted. Shards of format version 1 are written again as version 2, which loses
    nothing; all others are copied.

    Args: as `merge`; the sets must be whole.

    Raises:
        InputError: as `in_view_order`; a set that was pulled in part, or fewer than two sets.
        FormatError, TargetError: as `merge`.
    """
    if len(label_sets) < 2:
        raise InputError(f"merging takes two label sets or more, got {len(label_sets)}")
    if partial := next((each for each in label_sets if each.is_partial), None):
        raise InputError(f"only some shards of {partial.place} are here; pull all of them before merging views")
    ordered = in_view_order(label_sets)
    parts = [part for each in ordered for part in each.parts]
    counts = [part.spec.views_per_image for part in parts]
    spec = replace(
        parts[0].spec,
        views_per_image=sum(counts),
        views=parts[0].spec.views | {PARTS: counts},
        creation=_shared([each.spec.creation for each in ordered]),
        bounds=widest_bounds([each.spec for each in ordered]),
        format_version=2,
    )
    places = [(number, index) for number, part in enumerate(parts) for index in part.present]
    sizes = [parts[number].shards[index].samples for number, index in places]
    with LabelSetWriter(out, spec, sizes, options=options) as writer:

        def copy(position: int) -> None:
            number, index = places[position]
            part = parts[number]
            if part.spec.format_version == spec.format_version:
                data = part.read_whole(index)
            else:
                data = encode_shard(part.read_shard(index), spec.of_views(spec.parts[number]))
            writer.write_encoded(position, data, part.shards[index].images)

        for _ in each_shard(copy, writer.todo(), f"→ {out}", workers=workers):
            pass
        return writer.finish()


def _check_settings(first: LabelSet, other: LabelSet) -> None:
    found = [
        str(each)
        for each in differences(first.spec, other.spec)
        if each.entry not in _OWN or each.name == f"source.{OWN_CLASSES}"
    ]
    if not found:
        return
    form = [name for name in ("container", "encoding") if getattr(first.spec, name) != getattr(other.spec, name)]
    advice = f"; change the {' and the '.join(form)} with: stl-offline labels convert" if form else ""
    raise InputError(f"{first.place} and {other.place} cannot be merged: {'; '.join(found)}{advice}")


def _source(spec: LabelSpec, samples: int, fingerprint: str) -> dict[str, Any]:
    own = {} if spec.has_own_classes else {OWN_CLASSES: False}
    return {"samples": samples, "fingerprint": fingerprint} | own


def _read_parts(label_sets: Sequence[LabelSet], workers: int) -> list[_Part]:
    def read(place: tuple[LabelSet, int]) -> _Part:
        label_set, index = place
        found = label_set.read_index(index)
        return _Part(
            label_set,
            index,
            keys=json.dumps(found.keys).encode()[1:-1],
            hashes=label_set.key_hashes(index),
            class_ids=found.class_ids.astype("<i8").tobytes(),
            content_hashes=found.content_hashes.astype("<u8").tobytes(),
        )

    places = [(label_set, index) for label_set in label_sets for index in label_set.present]
    return list(each_shard(read, places, "keys", workers=workers))


def _check_keys(parts: list[_Part]) -> None:
    hashes = [part.hashes for part in parts]
    twice = find_duplicates(hashes, lambda position: json.loads(b"[%b]" % parts[position].keys))
    if not twice.count:
        return
    named = [f"{key} in {_name(parts[first])} and {_name(parts[second])}" for key, first, second in twice.examples]
    raise JoinError(
        f"{counted(twice.count, 'key')} {'is' if twice.count == 1 else 'are'} in these label sets twice "
        f"({some(twice.count, named)}); merge sets of different images, and each set once"
    )


def _name(part: _Part) -> str:
    return f"{part.label_set.place}/{part.label_set.shards[part.index].name}"


def _fingerprint(spec: LabelSpec, parts: list[_Part]) -> str:
    """The fingerprint of a .beton with these images in this order and the label set's class list."""
    keys = [piece for part in parts for piece in (b", ", part.keys)]
    return images_fingerprint(
        spec.class_names,
        [b"[", *keys[1:], b"]"],
        [part.class_ids for part in parts],
        [part.content_hashes for part in parts],
    )


def _shared(settings: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries that all have, with the same value."""
    first, *others = settings
    return {
        name: value for name, value in first.items() if all(name in other and other[name] == value for other in others)
    }
