"""Which label belongs to which picture: by key, never by position.

n: pictures; a place is (shard, row within the shard).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.label_set import LabelSet

_EXAMPLES = 3
POLICIES = ("error", "skip")


@dataclass(frozen=True)
class JoinReport:
    """Where each picture's label is, and what did not match.

    shard, row: (n,) int32, −1 where a picture has no label; matched, missing, changed, extra: counts of pictures with
    a label, without one, with another content hash than the labelled picture (among the matched), and of labels
    without a picture; ``*_examples``: a few keys of each.
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

    def __str__(self) -> str:
        parts = [f"{self.matched:,} of {len(self.shard):,} pictures have labels"]
        for count, what, examples in (
            (self.missing, "pictures without labels", self.missing_examples),
            (self.changed, "pictures changed since they were labelled", self.changed_examples),
            (self.extra, "labels without a picture", self.extra_examples),
        ):
            if count:
                parts.append(f"{count:,} {what} ({_list(count, examples)})")
        return "; ".join(parts)


def join(
    label_set: LabelSet,
    keys: Sequence[str],
    content_hashes: np.ndarray,
    class_names: Sequence[str],
    *,
    missing: str = "error",
    allow_changed: bool = False,
) -> JoinReport:
    """Find each picture's label by its key.

    Args:
        label_set: the labels; may hold more pictures, in any order.
        keys: (n,) keys of the pictures.
        content_hashes: (n,) uint64, xxh3 of each picture's bytes.
        class_names: the pictures' class list; must be the label set's, in its order.
        missing: "error", or "skip" to go on without labels for pictures that have none.
        allow_changed: go on with pictures whose bytes differ from those that were labelled.

    Raises:
        JoinError: another class list, missing keys, changed pictures: counted, with examples.
        InputError: a key that is there twice, or another word for ``missing``.
    """
    if missing not in POLICIES:
        raise InputError(f"missing must be one of {', '.join(POLICIES)}, got {missing!r}")
    if len(keys) != len(content_hashes):
        raise InputError(f"{len(keys)} keys and {len(content_hashes)} content hashes do not belong together")
    check_class_names(label_set.spec.class_names, tuple(class_names))
    content_hashes = np.asarray(content_hashes, dtype=np.uint64)
    # Keys are looked up by hash, and compared: a hundredth of a dictionary's memory for millions of pictures.
    hashes = _hash(keys)
    order = np.argsort(hashes, kind="stable")
    sorted_hashes = hashes[order]
    _check_unique(keys, sorted_hashes, order)
    shard = np.full(len(keys), -1, dtype=np.int32)
    row = np.full(len(keys), -1, dtype=np.int32)
    extra, changed = _Count(), _Count()
    for index in range(len(label_set.shards)):
        shard_keys, shard_hashes = label_set.read_index(index)
        found = np.searchsorted(sorted_hashes, _hash(shard_keys))
        for position, key in enumerate(shard_keys):
            sample = _find(key, int(found[position]), keys, order)
            if sample < 0:
                extra.add(key)
                continue
            if shard[sample] >= 0:
                raise JoinError(f"the label set {label_set.place} holds the key {key} twice")
            shard[sample] = index
            row[sample] = position
            if content_hashes[sample] != shard_hashes[position]:
                changed.add(key)
    without = np.flatnonzero(shard < 0)
    report = JoinReport(
        shard=shard,
        row=row,
        matched=len(keys) - len(without),
        missing=len(without),
        changed=changed.count,
        extra=extra.count,
        missing_examples=[keys[int(sample)] for sample in without[:_EXAMPLES]],
        changed_examples=changed.examples,
        extra_examples=extra.examples,
    )
    _judge(report, label_set, missing, allow_changed)
    return report


def check_class_names(labels: tuple[str, ...], pictures: tuple[str, ...]) -> None:
    """Raise `JoinError` where the two class lists differ, and say how."""
    if labels == pictures:
        return
    absent = sorted(set(pictures) - set(labels))
    if absent:
        how = f"{len(absent)} of the pictures' classes are not in it ({_list(len(absent), absent[:_EXAMPLES])})"
    elif len(labels) != len(pictures):
        absent = sorted(set(labels) - set(pictures))
        how = f"{len(absent)} of its classes are not among the pictures' ({_list(len(absent), absent[:_EXAMPLES])})"
    else:
        place = next(index for index, name in enumerate(labels) if name != pictures[index])
        how = f"the order differs: class {place} is {labels[place]!r} there and {pictures[place]!r} here"
    raise JoinError(
        f"the label set has another class list ({len(labels)} classes, the pictures have {len(pictures)}): {how}; "
        "pack the pictures with the label set's class list, or label them again"
    )


class _Count:
    def __init__(self) -> None:
        self.count = 0
        self.examples: list[str] = []

    def add(self, key: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(key)


def _judge(report: JoinReport, label_set: LabelSet, missing: str, allow_changed: bool) -> None:
    faults = []
    if not report.matched:
        faults.append("not one picture has a label; is this another data set, or another root folder")
    if report.missing and missing == "error":
        faults.append("--missing skip trains on without labels for these")
    if report.changed and not allow_changed:
        faults.append("--allow-changed uses the labels nevertheless")
    if faults:
        raise JoinError(f"labels {label_set.place} and pictures do not belong together: {report}. {'; '.join(faults)}")


def _hash(keys: Sequence[str]) -> np.ndarray:
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), dtype=np.uint64, count=len(keys))


def _find(key: str, position: int, keys: Sequence[str], order: np.ndarray) -> int:
    """The sample with this key, or −1. Two keys of one hash lie side by side."""
    while position < len(order):
        sample = int(order[position])
        if keys[sample] == key:
            return sample
        position += 1
        if _hash([keys[int(order[position - 1])]]) != _hash([key]):
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
            raise InputError(f"the pictures hold the key {key} twice")
        seen.add(key)


def _list(count: int, examples: Sequence[str]) -> str:
    return ", ".join(examples) + (", …" if count > len(examples) else "")
