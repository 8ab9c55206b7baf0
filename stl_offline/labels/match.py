"""What an image and its label have in common: their key, their stem or their content.

n: images. An *entry* is what labels are looked up for: an image, or all images of one content.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from stl_offline.errors import InputError
from stl_offline.labels.keys import hash_keys


class Matcher(Protocol):
    """Finds the entry that a label belongs to.

    entries: their number; entry_of_image: int64 (n,).
    """

    entries: int
    entry_of_image: np.ndarray

    def name(self, key: str) -> str:
        """What labels of this key are looked up by."""
        ...

    def find(self, keys: Sequence[str], content_hashes: np.ndarray) -> np.ndarray:
        """The entry of each label of a shard, −1 for none: int64 (len(keys),)."""
        ...


def stem(key: str) -> str:
    """A key's base name up to its first dot, as tars cut names: ``ant/x0.v2.jpg`` and ``train/x0`` have the stem x0."""
    base = key.rpartition("/")[2]
    return base[:1] + base[1:].partition(".")[0]


def matcher(match: str, keys: Sequence[str], content_hashes: np.ndarray) -> Matcher:
    """The matcher for n images; raises `InputError` where two of them have the same key or stem."""
    return ByContent(content_hashes) if match == "content" else ByName(keys, match)


class ByContent:
    """By content hash (uint64) alone."""

    def __init__(self, content_hashes: np.ndarray) -> None:
        self._known, self.entry_of_image = np.unique(content_hashes, return_inverse=True)
        self.entries = len(self._known)

    def name(self, key: str) -> str:
        return key

    def find(self, keys: Sequence[str], content_hashes: np.ndarray) -> np.ndarray:
        if not self.entries:
            return np.full(len(keys), -1)
        places = np.minimum(np.searchsorted(self._known, content_hashes), self.entries - 1)
        return np.where(self._known[places] == content_hashes, places, -1)


class ByName:
    """By key or stem. Names are looked up by hash and compared: a hundredth of a dictionary's memory for millions.

    Raises:
        InputError: two images have the same name.
    """

    def __init__(self, keys: Sequence[str], match: str) -> None:
        self._is_stem = match == "stem"
        self._keys = keys
        self._names = list(map(stem, keys)) if self._is_stem else keys
        hashes = hash_keys(self._names)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self.entries = len(keys)
        self.entry_of_image = np.arange(len(keys))
        self._check_unique()

    def name(self, key: str) -> str:
        return stem(key) if self._is_stem else key

    def find(self, keys: Sequence[str], content_hashes: np.ndarray) -> np.ndarray:
        if not self.entries:
            return np.full(len(keys), -1)
        names = list(map(stem, keys)) if self._is_stem else keys
        hashes = hash_keys(names)
        places = np.searchsorted(self._sorted, hashes)
        at = np.minimum(places, self.entries - 1)
        found = np.where(self._sorted[at] == hashes, self._order[at], -1)
        for row, entry in enumerate(found.tolist()):
            if entry >= 0 and self._names[entry] != names[row]:
                found[row] = self._find(names[row], int(places[row]), hashes[row])
        return found

    def _find(self, name: str, place: int, value: np.uint64) -> int:
        """Two names of one hash lie side by side."""
        while place < self.entries and self._sorted[place] == value:
            entry = int(self._order[place])
            if self._names[entry] == name:
                return entry
            place += 1
        return -1

    def _check_unique(self) -> None:
        seen: dict[str, int] = {}
        for place in np.flatnonzero(self._sorted[1:] == self._sorted[:-1]):
            # Different names of one hash are possible; so the names themselves decide.
            if place == 0 or self._sorted[place - 1] != self._sorted[place]:
                first = int(self._order[place])
                seen = {self._names[first]: first}
            entry = int(self._order[place + 1])
            name = self._names[entry]
            if name in seen and self._is_stem:
                raise InputError(
                    f"the images {self._keys[seen[name]]} and {self._keys[entry]} have the same stem {name}; use "
                    '`match="key"` or `match="content"`'
                )
            if name in seen:
                raise InputError(f"the images hold the key {name} twice")
            seen[name] = entry
