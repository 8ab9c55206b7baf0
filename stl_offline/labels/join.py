"""Finds the label of each image, by key and never by position.

n: images; a place is (shard, row within the shard).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.keys import explain, hash_keys, some
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.store import format_ranges

_EXAMPLES = 3
# Keys of labels without an image that are kept to look for a rule by which keys differ.
_LOOKED_AT = 10_000
POLICIES = ("error", "skip")


@dataclass(frozen=True)
class JoinReport:
    """The place of each image's label, and what did not match.

    shard, row: (n,) int32, −1 where an image has no label. Counts: matched, images with a label; missing, images
    without one; changed, matched images whose content hash differs from the labelled image's; extra, labels without an
    image. ``*_examples``: a few keys of each. hints: likely reasons why keys do not match.
    """

    shard: np.ndarray
    row: np.ndarray
    matched: int
    missing: int
    changed: int
    extra: int
    missing_examples: list[str] = field(default_factory=list)
    changed_examples: list[str] = field(default_factory=list)
    extra_examples: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.matched:,} of {len(self.shard):,} images have labels"]
        for count, what, examples in (
            (self.missing, "images without labels", self.missing_examples),
            (self.changed, "images changed since they were labelled", self.changed_examples),
            (self.extra, "labels without an image", self.extra_examples),
        ):
            if count:
                parts.append(f"{count:,} {what} ({some(count, examples)})")
        return "; ".join(parts + self.hints)


def join(
    label_set: LabelSet,
    keys: Sequence[str],
    content_hashes: np.ndarray,
    class_names: Sequence[str],
    *,
    missing: str = "error",
    allow_changed: bool = False,
) -> JoinReport:
    """Find each image's label by its key.

    Args:
        label_set: the labels; may hold more images, in any order.
        keys: (n,) keys of the images.
        content_hashes: (n,) uint64, xxh3 of each image's bytes.
        class_names: the images' class list; must be the label set's, in its order.
        missing: "error", or "skip" to accept images without a label.
        allow_changed: accept images whose bytes differ from those that were labelled.

    Raises:
        JoinError: another class list, missing keys, changed images: counted, with examples.
        InputError: two images have the same key, or ``missing`` has another value.
    """
    if missing not in POLICIES:
        raise InputError(f"`missing` must be one of {', '.join(POLICIES)}, got {missing!r}")
    if len(keys) != len(content_hashes):
        raise InputError(f"got {len(keys)} keys but {len(content_hashes)} content hashes; each image needs one of each")
    check_class_names(label_set.spec.class_names, tuple(class_names))
    content_hashes = np.asarray(content_hashes, dtype=np.uint64)
    # Keys are looked up by hash, and compared: a hundredth of a dictionary's memory for millions of images.
    hashes = hash_keys(keys)
    order = np.argsort(hashes, kind="stable")
    sorted_hashes = hashes[order]
    _check_unique(keys, sorted_hashes, order)
    shard = np.full(len(keys), -1, dtype=np.int32)
    row = np.full(len(keys), -1, dtype=np.int32)
    extra, changed = _Named(_LOOKED_AT), _Named(_EXAMPLES)
    extra_hashes, extra_contents = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    label_set.fetch()
    for index in label_set.present:
        found = label_set.read_index(index)
        shard_hashes = hash_keys(found.keys)
        places = np.searchsorted(sorted_hashes, shard_hashes)
        without = []
        for position, key in enumerate(found.keys):
            sample = _find(key, int(places[position]), keys, order)
            if sample < 0:
                extra.add(key)
                without.append(position)
                continue
            if shard[sample] >= 0:
                raise JoinError(f"the label set {label_set.place} holds the key {key} twice")
            shard[sample] = index
            row[sample] = position
            if content_hashes[sample] != found.content_hashes[position]:
                changed.add(key)
        extra_hashes.append(shard_hashes[without])
        extra_contents.append(found.content_hashes[without])
    unlabelled = np.flatnonzero(shard < 0)
    absent = [keys[int(sample)] for sample in unlabelled]
    hints = explain(
        absent, content_hashes[unlabelled], extra.keys, np.concatenate(extra_hashes), np.concatenate(extra_contents)
    )
    if label_set.is_partial and absent:
        hints.append(
            f"only the shards {format_ranges(label_set.present)} of {len(label_set.shards)} were pulled; to pull the "
            f"others: stl-offline labels pull SOURCE {label_set.place}"
        )
    report = JoinReport(
        shard=shard,
        row=row,
        matched=len(keys) - len(absent),
        missing=len(absent),
        changed=changed.count,
        extra=extra.count,
        missing_examples=absent[:_EXAMPLES],
        changed_examples=changed.keys,
        extra_examples=extra.keys[:_EXAMPLES],
        hints=hints,
    )
    _judge(report, label_set, missing, allow_changed)
    return report


def check_class_names(labels: tuple[str, ...], images: tuple[str, ...]) -> None:
    """Raise `JoinError`, with the first difference, where the two class lists are not equal."""
    if labels == images:
        return
    absent = sorted(set(images) - set(labels))
    advice = "pack the images with the label set's class list (`class_names`)"
    if absent:
        advice = "remove their images"
        how = f"{len(absent)} of the images' classes are not in it ({some(len(absent), absent[:_EXAMPLES])})"
    elif len(labels) != len(images):
        absent = sorted(set(labels) - set(images))
        how = f"{len(absent)} of its classes are not among the images' ({some(len(absent), absent[:_EXAMPLES])})"
    else:
        place = next(index for index, name in enumerate(labels) if name != images[index])
        how = (
            f"the order differs: class {place} is {labels[place]!r} in the label set and {images[place]!r} in the "
            "images"
        )
    raise JoinError(
        f"the label set ({len(labels)} classes) and the images ({len(images)}) have different class lists: {how}; "
        f"{advice}, or label the images again"
    )


class _Named:
    """Counts keys, and keeps the first of them."""

    def __init__(self, most: int) -> None:
        self.count = 0
        self.keys: list[str] = []
        self._most = most

    def add(self, key: str) -> None:
        self.count += 1
        if len(self.keys) < self._most:
            self.keys.append(key)


def _judge(report: JoinReport, label_set: LabelSet, missing: str, allow_changed: bool) -> None:
    faults = []
    if not report.matched:
        faults.append("no image has a label: check the data set and its root folder")
    if report.missing and missing == "error":
        faults.append('`missing="skip"` leaves these images unlabelled')
    if report.changed and not allow_changed:
        why = "all of them differ, as after resizing or recompression; " if report.changed == report.matched else ""
        faults.append(f"{why}`allow_changed=True` uses the labels anyway")
    if faults:
        raise JoinError(f"the labels {label_set.place} do not match the images: {report}. {'; '.join(faults)}")


def _find(key: str, position: int, keys: Sequence[str], order: np.ndarray) -> int:
    """The sample with this key, or −1. Two keys of one hash lie side by side."""
    while position < len(order):
        sample = int(order[position])
        if keys[sample] == key:
            return sample
        position += 1
        if hash_keys([keys[int(order[position - 1])]]) != hash_keys([key]):
            return -1
    return -1


def _check_unique(keys: Sequence[str], sorted_hashes: np.ndarray, order: np.ndarray) -> None:
    seen: set[str] = set()
    for place in np.flatnonzero(sorted_hashes[1:] == sorted_hashes[:-1]):
        # Different keys of one hash are possible; so the keys themselves decide.
        if place == 0 or sorted_hashes[place - 1] != sorted_hashes[place]:
            seen = {keys[int(order[place])]}
        key = keys[int(order[place + 1])]
        if key in seen:
            raise InputError(f"the images hold the key {key} twice")
        seen.add(key)
