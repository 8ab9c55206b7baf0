"""Keys of many images: compared by hash, and renamed.

Hashes take a hundredth of the memory of a dictionary of the keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from stl_offline.errors import InputError

_EXAMPLES = 3
# Fewer than these are compared key by key; more can only be counted by hash.
_COMPARED = 1000


@dataclass(frozen=True)
class Duplicates:
    """Keys that occur more than once: the number of surplus entries, and a few as (key, first list, other list)."""

    count: int
    examples: tuple[tuple[str, int, int], ...]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """uint64 (n,): xxh3 of each key's UTF-8. Raises InputError where a key has none."""
    try:
        return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), dtype=np.uint64, count=len(keys))
    except UnicodeEncodeError as error:
        raise InputError(
            f"the key {error.object!r} is not Unicode text (it holds half of a surrogate pair, as file names that are "
            "not UTF-8 give); rename the image"
        ) from error


@dataclass(frozen=True)
class KeyIndex:
    """Finds keys' places in a list by their hashes: sorted uint64 (n,), and int64 (n,), the place of each.

    Takes 16 bytes for each key, in memory that worker processes share. Other keys than the list's are told apart by
    their 64-bit hash alone: among 1.28 million keys a wrong one is taken for another with a probability of 7e-14.
    """

    hashes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, keys: Sequence[str]) -> "KeyIndex":
        """The index of distinct keys. Raises InputError where two are equal."""
        hashes = hash_keys(keys)
        places = np.argsort(hashes, kind="stable")
        hashes = hashes[places]
        if (again := np.flatnonzero(hashes[1:] == hashes[:-1])).size:
            raise InputError(f"the key {keys[int(places[again[0]])]!r} is there twice")
        return cls(hashes, places)

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """The place of each key, or −1: int64 (len(keys),)."""
        wanted = hash_keys(keys)
        at = np.minimum(np.searchsorted(self.hashes, wanted), len(self.hashes) - 1)
        return np.where(self.hashes[at] == wanted, self.places[at], -1)

    def row(self, key: str) -> int:
        """The place of one key, or −1; for one it is quicker than `rows`."""
        wanted = hash_keys((key,))[0]
        at = min(int(self.hashes.searchsorted(wanted)), len(self.hashes) - 1)
        return int(self.places[at]) if self.hashes[at] == wanted else -1


def find_duplicates(hashes: Sequence[np.ndarray], read_keys: Callable[[int], Sequence[str]]) -> Duplicates:
    """Keys that several lists share, or that one holds twice.

    Args:
        hashes: `hash_keys` of each list; read_keys: reads list number i again; only called for lists with duplicates.
    """
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return Duplicates(0, ())
    some_again = np.unique(again)[:_COMPARED]
    compared = set(some_again.tolist())
    seen: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    for index, own in enumerate(hashes):
        if not holds(some_again, own).any():
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


def parse_prefix(text: str) -> tuple[str, str]:
    """``OLD=NEW`` → what an image's key starts with, and what the label's key has there.

    Raises:
        InputError: no ``=``, or more than one.
    """
    if text.count("=") != 1:
        raise InputError(
            f"a key prefix is OLD=NEW, such as train/= (leave out train/) or =train/ (add it), got {text!r}"
        )
    old, new = text.split("=")
    return old, new


def rename_keys(keys: Sequence[str], text: str) -> list[str]:
    """Keys with the prefix OLD of ``OLD=NEW`` replaced by NEW; those that do not start with OLD stay. An empty text
    changes nothing.

    Raises:
        InputError: as `parse_prefix`; no key starts with OLD; two keys become the same one.
    """
    if not text:
        return list(keys)
    old, new = parse_prefix(text)
    if keys and not any(key.startswith(old) for key in keys):
        raise InputError(f"no image's key starts with the {old!r} of the key prefix {text}; they look like {keys[0]!r}")
    renamed = [_renamed(key, old, new) for key in keys]
    if len(set(renamed)) < len(set(keys)):
        first: dict[str, str] = {}
        one, other = next(
            (first[name], key) for name, key in zip(renamed, keys, strict=True) if first.setdefault(name, key) != key
        )
        raise InputError(f"the key prefix {text} gives two images one key: {one!r} and {other!r}; choose another")
    return renamed


def rename_key(key: str, text: str) -> str:
    """`rename_keys` of one key among others, which are not known: it stays where it does not start with OLD."""
    return _renamed(key, *parse_prefix(text)) if text else key


def _renamed(key: str, old: str, new: str) -> str:
    return new + key[len(old) :] if key.startswith(old) else key


def holds(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool (n,): which of ``values`` are in ``known``, which is sorted and not empty."""
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values
