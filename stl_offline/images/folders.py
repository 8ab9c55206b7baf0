"""Images in a tree with one folder per class."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from stl_offline.errors import InputError
from stl_offline.images.common import SourceImage, check_text, choose_class_names, is_image_name
from stl_offline.images.encode import ImageError


class FolderSource:
    """A tree with one folder per class; a class may hold folders of its own.

    Keys are paths below the root with "/" between, in sorted order. Hidden files, and files that are no images by
    their names, are passed over; symbolic links are followed.
    """

    kind = "folder"

    def __init__(self, root: str | Path, class_names: Sequence[str] | None = None) -> None:
        self.root = Path(root)
        self._keys = sorted(key for key, _ in folder_files(self.root))
        names = [key.partition("/")[0] for key in self._keys]
        self.class_names = choose_class_names(set(names), class_names, str(root))
        class_ids = {name: number for number, name in enumerate(self.class_names)}
        self._class_ids = [class_ids[name] for name in names]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SourceImage]:
        for key, class_id in zip(self._keys, self._class_ids, strict=True):
            yield SourceImage(key, class_id, partial(_read_file, self.root / key))


def folder_files(root: Path) -> list[tuple[str, os.DirEntry[str]]]:
    """(key, entry) of every image in a class-per-folder tree, in no order.

    Raises:
        InputError: no images, images outside of class folders, a class folder without images, a name that is not
            UTF-8.
    """
    try:
        entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read the folder {root}: {error.strerror}") from error
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    loose = sorted(entry.name for entry in entries if not entry.is_dir() and is_image_name(entry.name))
    if not classes:
        tars = sorted(entry.name for entry in entries if entry.name.endswith(".tar"))
        if tars:
            raise InputError(f"{root} holds tars: name them as a brace pattern, for example {root}/{tars[0]}")
        where = f"{len(loose):,} images but no class folders" if loose else "no images"
        raise InputError(f"{root} holds {where}; give a folder that has one folder of images per class")
    if loose:
        raise InputError(f"{root}/{loose[0]} lies beside the class folders; move it into its class's folder, or away")
    found: list[tuple[str, os.DirEntry[str]]] = []
    empty = []
    for name in classes:
        before = len(found)
        found += _walk(root / name, name, frozenset())
        if len(found) == before:
            empty.append(name)
    if not found:
        raise InputError(f"{root} holds no images; give a folder that has one folder of images per class")
    if empty:
        raise InputError(
            f"{len(empty):,} class folders of {root} hold no images, for example {empty[0]!r}; fill or remove them"
        )
    return found


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    try:
        status = os.stat(folder)
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise InputError(f"{folder} is a link to a folder that it lies in; remove the link")
    for entry in entries:
        if entry.name.startswith("."):
            continue
        key = f"{prefix}/{entry.name}"
        if entry.is_dir():
            yield from _walk(folder / entry.name, key, above | {identity})
        elif is_image_name(entry.name):
            yield check_text(key, "file name"), entry


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error
