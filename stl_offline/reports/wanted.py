"""Which images a page asks for, and what it gets: without what reads images, since a page of label maps needs none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stl_offline.errors import InputError
from stl_offline.labels.match import stem


@dataclass(frozen=True)
class FoundImage:
    """One image of a source. position: its number in the source, from which the loader derives its crops;
    content_hash: xxh3 of its bytes; load: returns RGB uint8 (H, W, 3)."""

    position: int
    content_hash: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Wanted:
    """Which images to find: by the keys of their labels, and what `match` compares (see `stl_offline.labels.join`).

    content_hashes: of each key, for ``match="content"``.
    """

    keys: Sequence[str]
    match: str = "key"
    content_hashes: Sequence[int] = ()

    def by_identity(self) -> dict[str | int, list[str]]:
        """What identifies an image, with the keys of the labels that it has.

        Raises:
            InputError: two keys have the same stem.
        """
        names = self.content_hashes if self.match == "content" else [self.name(key) for key in self.keys]
        found: dict[str | int, list[str]] = {}
        for name, key in zip(names, self.keys, strict=True):
            found.setdefault(name, []).append(key)
        double = next((keys for keys in found.values() if len(set(keys)) > 1), None)
        if double and self.match == "stem":
            raise InputError(
                f'the labels {double[0]} and {double[1]} have the same stem; use `match="key"` or `match="content"`'
            )
        return found

    def name(self, key: str) -> str:
        return stem(key) if self.match == "stem" else key


@dataclass(frozen=True)
class FoundImages:
    """Images by the key of their label, and the class list of their source."""

    class_names: tuple[str, ...]
    by_key: dict[str, FoundImage]


# (source, what is wanted, class names) → the images found, without those that the source lacks.
FindImages = Callable[[str, Wanted, tuple[str, ...] | None], FoundImages]
