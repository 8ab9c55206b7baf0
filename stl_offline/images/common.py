"""What every source of images shares: its interface, and the rules for class lists and names."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from stl_offline.errors import InputError
from stl_offline.images.encode import IMAGE_SUFFIXES


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source. ``data`` reads its bytes; raises `ImageError` where they cannot be read."""

    key: str
    class_id: int
    load: Callable[[], bytes]

    @property
    def data(self) -> bytes:
        return self.load()


class Source(Protocol):
    """A data set of images, in a fixed order.

    kind: "folder", "tar" or "timm"; class_names: the names that class ids count through; len: how many images there
    are (at most); files: (name, path) of each file that the images come from, for naming a cache by content.
    """

    kind: str
    class_names: tuple[str, ...]

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SourceImage]: ...


def is_image_name(name: str) -> bool:
    """Whether a file's name says that it is an image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def choose_class_names(found: Iterable[str], wanted: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """The class list: that which is wanted, else what was found, sorted (whole numbers by value).

    Raises:
        InputError: fewer than two classes, or classes that the wanted list does not have.
    """
    found = set(found)
    if wanted is not None:
        wanted = check_class_names(wanted)
        unknown = sorted(found - set(wanted))
        if unknown:
            raise InputError(
                f"{where} has {len(unknown):,} classes that the given list of {len(wanted):,} lacks, for example "
                f"{unknown[0]!r}; both must use the same class names"
            )
        return wanted
    numbers = all(name.isascii() and name.isdigit() for name in found)
    names = tuple(sorted(found, key=lambda name: (int(name), name) if numbers else (0, name)))
    if len(names) < 2:
        raise InputError(f"{where} holds only one class ({''.join(names)!r}); training and measuring take two")
    return check_class_names(names)


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """A class list as a tuple; raises `InputError` where it has fewer than two names, doubles, or odd text."""
    names = tuple(names)
    if len(names) < 2:
        raise InputError(f"a class list needs at least two names, got {list(names)}")
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise InputError(f"the class list names {double!r} twice")
    for name in names:
        check_text(name, "class name")
    return names


def check_text(text: str, what: str) -> str:
    """Text that can be stored as UTF-8, unchanged; else raises `InputError`."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the {what} {text!r} is not UTF-8; rename it") from error
    return text
