"""Images in a tree with one folder per class."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stl_offline.errors import InputError, counted
from stl_offline.images.classes import UNLABELLED, ClassChoice, is_split_name, refuse_splits
from stl_offline.images.common import (
    PassedOver,
    Place,
    SourceImage,
    check_keys,
    enter,
    entries,
    is_image_name,
    may_hold_image,
)
from stl_offline.images.encode import IMAGE_HEAD, is_image_head
from stl_offline.pixels import ImageError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


@dataclass(slots=True)
class FolderFile:
    """An image of a folder. problem: why it cannot be read, as ``skip_broken`` reports it; "" for a regular file."""

    key: str
    entry: os.DirEntry[str]
    problem: str


class FolderSource:
    """A tree with one folder per class; a class may hold folders of its own.

    Keys are paths below the root with "/" between, in sorted order. Symbolic links to files and folders are followed,
    also to places outside of the root: data sets are often trees of links. Images without any class folder have the
    class `UNLABELLED`. What is taken and what is passed over: `stl_offline.images.common`.
    """

    kind = "folder"

    def __init__(self, root: str | Path, choice: ClassChoice) -> None:
        self.root = Path(root)
        files, self.passed_over = folder_files(self.root)
        problems = {file.key: file.problem for file in files}
        del files  # an entry of a large tree takes as much memory as its key several times
        self._keys = sorted(problems)
        self._problems = {key: problem for key, problem in problems.items() if problem}
        found = [key.partition("/")[0] if "/" in key else UNLABELLED for key in self._keys]
        _refuse_splits(self.root, self._keys, found, choice)
        renamed = {name: choice.rename(name, str(root)) for name in sorted(set(found))}
        self.class_names = choice.class_list(renamed.values(), str(root))
        class_ids = {name: number for number, name in enumerate(self.class_names)}
        self._class_ids = [class_ids[renamed[name]] for name in found]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SourceImage]:
        for key, class_id in zip(self._keys, self._class_ids, strict=True):
            yield SourceImage(key, class_id, partial(_read_image, self.root / key, self._problems.get(key, "")))


def folder_files(root: Path) -> tuple[list[FolderFile], PassedOver]:
    """Every image in a class-per-folder tree, in no order, and what was passed over.

    Raises:
        InputError: no images, images beside class folders, a class folder without images, names that
            cannot be keys (`check_keys`).
    """
    passed_over = PassedOver()
    classes, loose = [], []
    for entry in entries(root):
        if entry.is_dir():
            classes.append(entry.name)
        elif (file := _image_file(entry, entry.name, passed_over)) is not None:
            loose.append(file)
    if not classes:
        if not loose:
            tars = sorted(name for name in os.listdir(root) if name.endswith(_TARS))
            if tars:
                raise InputError(f"{root} holds tars: name them as a brace pattern, for example {root}/{tars[0]}")
            raise _no_images(root, passed_over)
        check_keys((file.key for file in loose), "file name")
        return loose, passed_over
    if loose:
        first = min(file.key for file in loose)
        raise InputError(f"{root}/{first} lies beside the class folders; move it into its class's folder, or away")
    found: list[FolderFile] = []
    empty = []
    for name in sorted(classes):
        before = len(found)
        found += _walk(root / name, name, (), passed_over)
        if len(found) == before:
            empty.append(name)
    if not found:
        raise _no_images(root, passed_over)
    if empty:
        raise InputError(
            f"{counted(len(empty), 'class folder')} of {root} without images, for example {empty[0]!r}; "
            "fill or remove them" + (f" (passed over: {passed_over})" if passed_over else "")
        )
    check_keys((file.key for file in found), "file name")
    return found, passed_over


def read_regular(path: str | Path, size: int = -1) -> bytes:
    """The bytes of a regular file, or its first ``size``; never waits for a pipe's other end.

    Raises:
        ImageError: it is no regular file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise ImageError(_kind_of_file(mode))
            return stream.read(size)
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def _walk(folder: Path, prefix: str, above: Place, passed_over: PassedOver) -> Iterator[FolderFile]:
    above = enter(folder, above)
    for entry in entries(folder):
        key = f"{prefix}/{entry.name}"
        if entry.is_dir():
            inner = list(_walk(folder / entry.name, key, above, passed_over))
            yield from inner
            if not inner and is_image_name(entry.name):
                yield FolderFile(key, entry, "is a folder, not an image file")
        elif (file := _image_file(entry, key, passed_over)) is not None:
            yield file


def _image_file(entry: os.DirEntry[str], key: str, passed_over: PassedOver) -> FolderFile | None:
    """An entry that is no folder, as an image; None, and counted, where it is none."""
    named = is_image_name(entry.name)
    if entry.is_file():
        if named or (may_hold_image(entry.name) and _starts_as_image(entry.path)):
            return FolderFile(key, entry, "")
    elif named:
        return FolderFile(key, entry, _problem(entry))
    passed_over.add(key)
    return None


def _starts_as_image(path: str) -> bool:
    try:
        return is_image_head(read_regular(path, IMAGE_HEAD))
    except ImageError:
        return False


def _problem(entry: os.DirEntry[str]) -> str:
    try:
        return _kind_of_file(os.stat(entry.path).st_mode)
    except FileNotFoundError:
        return (
            f"is a link to {os.readlink(entry.path)}, which does not exist (with git-annex or DVC, get the file first)"
        )
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _kind_of_file(mode: int) -> str:
    names = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return f"is {names.get(stat.S_IFMT(mode), 'a device')}, not a regular file"


def _read_image(path: Path, problem: str) -> bytes:
    if problem:
        raise ImageError(problem)
    return read_regular(path)


def _no_images(root: Path, passed_over: PassedOver) -> InputError:
    passed = f" (passed over: {passed_over})" if passed_over else ""
    return InputError(f"{root} holds no images{passed}; give a folder that has one folder of images per class")


def _refuse_splits(root: Path, keys: list[str], found: list[str], choice: ClassChoice) -> None:
    names = set(found)
    if all(map(is_split_name, names)) and not names <= set(choice.names or ()):
        raise InputError(
            f"{root} holds the splits {', '.join(sorted(names)[:4])} in place of classes; name the folder of one "
            f"split, for example {root}/{min(names)}"
        )
    refuse_splits([key.split("/")[:-1] for key in keys], choice, f"the classes of {root} hold", "keep each split apart")
