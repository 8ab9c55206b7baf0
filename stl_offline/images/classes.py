"""Class lists: found in folders, given by the user, or renamed by a class map.

Classes are the folders in which images lie, where paths first differ. A folder whose classes are all called train, val,
test and the like holds splits, and is refused. Images without any folder have the one class `UNLABELLED`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stl_offline.errors import InputError
from stl_offline.files import read_file
from stl_offline.images.common import check_text

# The class of images that lie in no folder. They can be packed and labelled; training needs two classes.
UNLABELLED = "unlabelled"

_SPLIT = re.compile(
    r"(train|training|trainval|val|valid|validation|minival|test|testing|dev|devel|eval|evaluation|holdout)"
    r"([-_ ]?(set|split|data|images))?[-_ ]?\d*",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class ClassChoice:
    """How the classes that a source finds become its class list.

    names: the list to use, else that which is found, sorted (whole numbers by value); renamed: found name → name, as
    for tars whose classes are numbers. Without ``names``, its values are the class list, in its order.

    Raises:
        InputError: a list with fewer than two names, the same name twice, or text that is not UTF-8.
    """

    names: tuple[str, ...] | None = None
    renamed: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        names = self.names
        if names is None and self.renamed is not None:
            names = tuple(self.renamed.values())
        if names is not None:
            object.__setattr__(self, "names", check_class_names(names))

    def rename(self, found: str, where: str) -> str:
        """The name of a class that was found; raises `InputError` where the class map lacks it."""
        if self.renamed is None:
            return found
        if found not in self.renamed:
            raise InputError(f"{where} has the class {found!r}, which the class map lacks; add it to the map")
        return self.renamed[found]

    def class_list(self, found: Iterable[str], where: str) -> tuple[str, ...]:
        """The class list for these (renamed) classes; raises `InputError` where ``names`` lacks one of them."""
        found = set(found)
        if self.names is None:
            numbers = all(name.isascii() and name.isdigit() for name in found)
            return tuple(sorted(found, key=lambda name: (int(name), name) if numbers else (0, name)))
        unknown = sorted(found - set(self.names))
        if unknown:
            raise InputError(
                f"{where} has {len(unknown):,} classes that the given list of {len(self.names):,} lacks, for example "
                f"{unknown[0]!r}; both must use the same class names"
            )
        return self.names


def folder_classes(keys: Sequence[str], choice: ClassChoice, where: str) -> list[str]:
    """The class of each key, by the folders in which it lies: the first folder below those that all keys share.

    Raises:
        InputError: some keys lie beside the class folders, or the folders are splits.
    """
    folders = [key.split("/")[:-1] for key in keys]
    first, last = min(folders), max(folders)
    shared = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    depth = _named_depth(folders, choice)
    if depth is None:
        depth = shared if first != last else shared - 1
    if depth < 0:
        return [UNLABELLED] * len(keys)
    bare = min((key for key, folder in zip(keys, folders, strict=True) if len(folder) <= depth), default=None)
    if bare is not None:
        raise InputError(
            f"{where}: {bare!r} lies beside the class folders and has no class; move it into its class's folder, "
            "or give every sample of a tar a .cls member"
        )
    found = [folder[depth] for folder in folders]
    if len(set(found)) == 1 and is_split_name(found[0]) and found[0] not in (choice.names or ()):
        return [UNLABELLED] * len(keys)
    refuse_splits(folders, choice, f"{where} holds", "make one tar per split, or give the class list as `class_names`")
    return found


def _named_depth(folders: list[list[str]], choice: ClassChoice) -> int | None:
    """The depth at which all folders are classes of a given list."""
    if choice.names is None or choice.renamed is not None:
        return None
    names = set(choice.names)
    depths = range(min(len(folder) for folder in folders))
    return next((depth for depth in depths if all(folder[depth] in names for folder in folders)), None)


def is_split_name(name: str) -> bool:
    """Whether a folder is called as splits of data sets are: train, val2017, test_set, …"""
    return _SPLIT.fullmatch(name) is not None


def refuse_splits(folders: Iterable[Sequence[str]], choice: ClassChoice, what: str, advice: str) -> None:
    """Raise `InputError` where the folders at one depth are several splits, which would become classes or be merged."""
    for names in map(set, zip(*folders, strict=False)):
        if len(names) > 1 and all(map(is_split_name, names)) and not names <= set(choice.names or ()):
            splits = sorted(names)
            raise InputError(f"{what} the splits {', '.join(splits[:4])}, not only classes; {advice}")


def check_class_names(names: Sequence[str]) -> tuple[str, ...]:
    """A class list as a tuple; raises `InputError` where it has fewer than two names, doubles, or odd text."""
    names = tuple(names)
    if len(names) < 2:
        raise InputError(f"a class list needs at least two names, got {list(names)}")
    if len(set(names)) != len(names):
        double, _ = Counter(names).most_common(1)[0]
        places = [number for number, name in enumerate(names) if name == double]
        raise InputError(f"the class list names {double!r} twice (classes {places[0]} and {places[1]})")
    for name in names:
        check_text(name, "class name")
    return names


def read_class_map(path: str | Path) -> dict[str, str]:
    """New names of classes: lines "NUMBER NAME" (or any name without spaces, then its new one), or JSON.

    JSON: a list, whose places are the numbers, or an object. Numbers come in their order, which is that of the class
    list; other names in that of the file.

    Raises:
        InputError: it cannot be read, names a class twice, or gives two classes the same name.
    """
    text = _read_text(path).strip()
    if text.startswith(("[", "{")):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the class map {path} is not valid JSON: {error}") from error
        pairs = list(value.items() if isinstance(value, dict) else enumerate(value))
    else:
        pairs = [line.split(None, 1) for line in text.split("\n") if line.strip()]
        short = next((pair for pair in pairs if len(pair) < 2), None)
        if short is not None:
            raise InputError(f"the class map {path} has the line {short[0]!r}; each line is a number and a name")
    found: dict[str, str] = {}
    for old, new in pairs:
        if not isinstance(new, str) or not new.strip():
            raise InputError(f"the class map {path} gives the class {old} the name {new!r}, which is no text")
        if str(old) in found:
            raise InputError(f"the class map {path} has the class {old} twice")
        found[str(old)] = new.strip()
    if all(old.isascii() and old.isdigit() for old in found):
        found = dict(sorted(found.items(), key=lambda item: int(item[0])))
    try:
        check_class_names(list(found.values()))
    except InputError as error:
        raise InputError(f"the class map {path}: {error}") from error
    return found


def _read_text(path: str | Path) -> str:
    try:
        text = read_file(path).decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise InputError(f"{path} is not a text file; save it as UTF-8 text")
    return text
