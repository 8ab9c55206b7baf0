"""What a page needs of a picture, whoever finds it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Picture:
    """One picture of a source. position: its number in the source, which the loader draws its crops by; content_hash:
    xxh3 of its bytes; load: gives RGB uint8 (H, W, 3)."""

    position: int
    content_hash: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Pictures:
    """Pictures by key, and the class list of the source that they are from."""

    class_names: tuple[str, ...]
    by_key: dict[str, Picture]


# (source, keys, class names) → the pictures with these keys, as many as the source has.
FindPictures = Callable[[str, Iterable[str], tuple[str, ...]], Pictures]
