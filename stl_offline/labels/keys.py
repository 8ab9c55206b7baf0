"""Keys of many images by their hashes: a hundredth of the memory that a dictionary of them would take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

_EXAMPLES = 3
# Fewer than these are compared key by key; more can only be counted by hash.
_COMPARED = 1000


@dataclass(frozen=True)
class Duplicates:
    """Keys that are there more than once: how many entries too many, and a few of them as (key, list, other list)."""

    count: int
    examples: tuple[tuple[str, int, int], ...]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """uint64 (n,): xxh3 of each key's UTF-8."""
    return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), dtype=np.uint64, count=len(keys))


def find_duplicates(hashes: Sequence[np.ndarray], read_keys: Callable[[int], Sequence[str]]) -> Duplicates:
    """Keys that several lists share, or that one holds twice.

    Args:
        hashes: `hash_keys` of each list; read_keys: gives list number i again, for those that matter.
    """
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return Duplicates(0, ())
    compared = set(np.unique(again)[:_COMPARED].tolist())
    seen: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    for index, own in enumerate(hashes):
        if not np.isin(own, list(compared)).any():
            continue
        for key, value in zip(read_keys(index), own.tolist(), strict=True):
            if value in compared:
                if key in seen:
                    found.append((key, seen[key], index))
                seen.setdefault(key, index)
    # Different keys of one hash are possible; so the keys themselves decide, as long as there are not too many.
    count = len(found) if len(compared) < _COMPARED else max(len(found), len(again))
    return Duplicates(count, tuple(found[:_EXAMPLES]))


def some(count: int, examples: Sequence[str]) -> str:
    """A few of ``count`` names, for a message."""
    return ", ".join(examples[:_EXAMPLES]) + (", …" if count > min(len(examples), _EXAMPLES) else "")
