"""Finds the label of each image: by key, stem or content, and never by position.

n: images; a place is (shard, row within the shard).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.explain import Difference, explain
from stl_offline.labels.keys import some
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.match import matcher
from stl_offline.labels.store import format_ranges
from stl_offline.settings import check_match

_EXAMPLES = 3
_REORDER = "pack the images with the label set's class list (`class_names`), or label the images again"
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
        for count, what, rest, examples in (
            (self.missing, "image", "without labels", self.missing_examples),
            (self.changed, "image", "changed since they were labelled", self.changed_examples),
            (self.extra, "label", "without an image", self.extra_examples),
        ):
            if count:
                parts.append(f"{count:,} {what}{'s' * (count != 1)} {rest} ({some(count, examples)})")
        return "; ".join(parts + self.hints)


def join(
    label_set: LabelSet,
    keys: Sequence[str],
    content_hashes: np.ndarray,
    class_names: Sequence[str],
    *,
    match: str = "key",
    missing: str = "error",
    allow_changed: bool = False,
) -> JoinReport:
    """Find each image's label.

    Args:
        label_set: the labels; may hold more images, in any order.
        keys: (n,) keys of the images.
        content_hashes: (n,) uint64, xxh3 of each image's bytes.
        class_names: the images' class list; must be the label set's, in its order.
        match: what an image and its label have in common: the "key"; the "stem", the key's base name up to its first
            dot; or the "content", whatever the keys. Contents are compared in all cases. Images of equal content share
            a label; of several labels of equal content the first is taken.
        missing: "error", or "skip" to accept images without a label.
        allow_changed: accept images whose bytes differ from those that were labelled; not with ``match="content"``.

    Raises:
        JoinError: another class list, missing keys, changed images: counted, with examples.
        InputError: two images have the same key (or stem), or an argument has another value.
        FormatError: the label set is damaged, or holds a key twice.
    """
    if missing not in POLICIES:
        raise InputError(f"`missing` must be one of {', '.join(POLICIES)}, got {missing!r}")
    check_match(match, allow_changed=allow_changed)
    if len(keys) != len(content_hashes):
        raise InputError(f"got {len(keys)} keys but {len(content_hashes)} content hashes; each image needs one of each")
    check_class_names(label_set.spec.class_names, tuple(class_names))
    content_hashes = np.asarray(content_hashes, dtype=np.uint64)
    found = matcher(match, keys, content_hashes)
    entry_shard = np.full(found.entries, -1, dtype=np.int32)
    entry_row = np.full(found.entries, -1, dtype=np.int32)
    extra, changed = _Named(), _Named()
    label_set.fetch()
    for index in label_set.present:
        shard = label_set.read_index(index)
        entries = found.find(shard.keys, shard.content_hashes)
        extra.add(shard.keys, np.flatnonzero(entries < 0))
        rows = np.flatnonzero(entries >= 0)
        # Of several labels of one entry, the first.
        is_first = np.zeros(len(rows), dtype=bool)
        is_first[np.unique(entries[rows], return_index=True)[1]] = True
        is_first &= entry_shard[entries[rows]] < 0
        if match != "content" and not is_first.all():
            name = found.name(shard.keys[rows[~is_first][0]])
            advice = '; use `match="key"` or `match="content"`' if match == "stem" else ""
            raise JoinError(f"the label set {label_set.place} holds the {match} {name} twice{advice}")
        rows = rows[is_first]
        entries = entries[rows]
        entry_shard[entries], entry_row[entries] = index, rows
        if match != "content":
            changed.add(keys, entries[content_hashes[entries] != shard.content_hashes[rows]])
    label_set.check_unique()
    shards, rows = entry_shard[found.entry_of_image], entry_row[found.entry_of_image]
    unlabelled = np.flatnonzero(shards < 0)
    absent = [keys[int(sample)] for sample in unlabelled]
    hints = []
    if absent or changed.count:
        hints = explain(label_set, keys, content_hashes, Difference(match, unlabelled, changed.count))
    if label_set.lacks_shards and absent:
        hints.append(
            f"only the shards {format_ranges(label_set.present)} of {len(label_set.shards)} were pulled; to pull the "
            f"others: stl-offline labels pull SOURCE {label_set.place}"
        )
    report = JoinReport(
        shard=shards,
        row=rows,
        matched=len(keys) - len(absent),
        missing=len(absent),
        changed=changed.count,
        extra=extra.count,
        missing_examples=absent[:_EXAMPLES],
        changed_examples=changed.keys,
        extra_examples=extra.keys,
        hints=hints,
    )
    _judge(report, label_set, missing, allow_changed)
    return report


def check_class_names(labels: tuple[str, ...], images: tuple[str, ...], reorder: str = _REORDER) -> None:
    """Raise `JoinError`, with the first difference, where the two class lists are not equal; reorder: what to do where
    it is their order."""
    if labels == images:
        return
    absent = sorted(set(images) - set(labels))
    advice = _REORDER
    if absent:
        advice = "remove their images, or label the images again"
        if all(name.isdecimal() for name in images) and not any(name.isdecimal() for name in labels):
            advice = "pack the images with names for their numbers (`pack(class_map)`), or label the images again"
        how = f"{len(absent)} of the images' classes are not in it ({some(len(absent), absent[:_EXAMPLES])})"
    elif len(labels) != len(images):
        absent = sorted(set(labels) - set(images))
        how = f"{len(absent)} of its classes are not among the images' ({some(len(absent), absent[:_EXAMPLES])})"
    else:
        advice = reorder
        place = next(index for index, name in enumerate(labels) if name != images[index])
        how = (
            f"the order differs: class {place} is {labels[place]!r} in the label set and {images[place]!r} in the "
            "images"
        )
    raise JoinError(
        f"the label set ({len(labels)} classes) and the images ({len(images)}) have different class lists: {how}; "
        + advice
    )


class _Named:
    """Counts keys, and keeps the first of them."""

    def __init__(self) -> None:
        self.count = 0
        self.keys: list[str] = []

    def add(self, keys: Sequence[str], places: np.ndarray) -> None:
        self.count += len(places)
        self.keys += [keys[place] for place in places[: _EXAMPLES - len(self.keys)].tolist()]


def _judge(report: JoinReport, label_set: LabelSet, missing: str, allow_changed: bool) -> None:
    faults = []
    if not report.matched:
        faults.append("no image has a label" + ("" if report.hints else ": check the data set and its root folder"))
    # Without a single label, skipping would be refused, too.
    if report.missing and missing == "error" and report.matched:
        faults.append('`missing="skip"` leaves these images unlabelled')
    if report.changed and not allow_changed:
        why = "all of them differ, as after resizing or recompression; " if report.changed == report.matched else ""
        faults.append(f"{why}`allow_changed=True` uses the labels anyway")
    if faults or (report.missing and (missing == "error" or not report.matched)):
        raise JoinError(f"the labels {label_set.place} do not match the images: {report}. {'; '.join(faults)}")
