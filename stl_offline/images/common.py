"""What every source of images shares: its interface, and which files are images.

Images are regular files (or links to them) with the extension of an image format. A file with an unknown extension, or
none, is taken where its first bytes are those of an image. Hidden files and what file managers leave (``.x``,
``._x.jpg``, ``@eaDir``, ``__MACOSX``, ``Thumbs.db``) are no part of a data set. Everything else is passed over and
counted by kind. A pipe, device, folder or dangling link with an image's name is a broken image, which ``skip_broken``
leaves out.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from stl_offline.errors import NO_TEXT, InputError
from stl_offline.images.encode import IMAGE_SUFFIXES

MAX_KEY_BYTES = 4096

_SYSTEM_FILES = frozenset(
    ("@eadir", "__macosx", "__pycache__", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found")
)
# Never opened to look for an image: other data beside images, and copies that editors and downloads leave.
_OTHER = (
    "txt md rst csv tsv json jsonl xml yaml yml html htm log cls npy npz mat pkl pt pth bin db h5 hdf5 parquet zip gz "
    "tgz bz2 xz zst 7z rar tar pdf py sh mp4 avi mov mkv wav mp3 bak orig old tmp part crdownload swp lock thm psd xcf "
    "svg ai eps beton zarr safetensors ini cfg toml sha256 md5 dvc"
)
_OTHER_SUFFIXES = frozenset("." + suffix for suffix in _OTHER.split())

# The folders that one lies in: device and inode of each.
Place = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of a source. ``data`` reads its bytes; raises `ImageError` where they cannot be read.

    held: bytes of it that are in memory already.
    """

    key: str
    class_id: int
    load: Callable[[], bytes]
    held: int = 0

    @property
    def data(self) -> bytes:
        return self.load()


@dataclass
class PassedOver:
    """Files that a source leaves out because they are no images: how many of each kind, and the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, name: str) -> None:
        """Count a file by its extension."""
        kind = os.path.splitext(name)[1].lower() or "without extension"
        self.counts[kind] += 1
        self.examples.setdefault(kind, name)

    def __len__(self) -> int:
        return self.counts.total()

    def __str__(self) -> str:
        kinds = sorted(self.counts, key=lambda kind: (-self.counts[kind], kind))
        shown = [f"{self.counts[kind]:,} {kind} (such as {self.examples[kind]})" for kind in kinds[:8]]
        return ", ".join(shown + (["…"] if len(kinds) > 8 else []))


class Source(Protocol):
    """A data set of images, in a fixed order.

    kind: "folder", "tar" or "timm"; class_names: the names that class ids count through; passed_over: files that are
    no images; len: how many images there are (at most).
    """

    kind: str
    class_names: tuple[str, ...]
    passed_over: PassedOver

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[SourceImage]: ...


def is_image_name(name: str) -> bool:
    """Whether a file name's extension is that of an image format."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or left by a file manager: no part of a data set."""
    return name.startswith(".") or name.lower() in _SYSTEM_FILES


def may_hold_image(name: str) -> bool:
    """Whether a file that `is_image_name` does not take is worth a look at its first bytes."""
    return not name.endswith("~") and os.path.splitext(name)[1].lower() not in _OTHER_SUFFIXES


def check_text(text: str, what: str) -> str:
    """Text that can be a key or a class name, unchanged; else raises `InputError`."""
    fault = _text_fault(text)
    if fault:
        raise InputError(f"the {what} {_start(text)} {fault}")
    return text


def check_keys(keys: Iterable[str], what: str) -> None:
    """Raise `InputError`, with their number, where some of a source's keys cannot be stored as such."""
    faults = [(key, fault) for key in keys if (fault := _text_fault(key))]
    if faults:
        key, fault = min(faults)
        more = f"; {len(faults) - 1:,} more {what}s cannot be used either" if len(faults) > 1 else ""
        raise InputError(f"the {what} {_start(key)} {fault}{more}")


def _text_fault(text: str) -> str:
    """Why a text cannot be a key or a class name, "" where it can. The same rules hold for keys of label sets."""
    if text.isascii() and text.isprintable() and len(text) <= MAX_KEY_BYTES:  # nearly all
        return ""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "is not UTF-8; rename it"
    if NO_TEXT.search(text):
        return "holds a control character; rename it"
    return f"is {size:,} bytes long, over {MAX_KEY_BYTES:,}; shorten it" if size > MAX_KEY_BYTES else ""


def _start(text: str) -> str:
    return repr(text) if len(text) <= 100 else f"{text[:40]!r}…"


def files_below(root: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder but those of the system: its path from there with "/" between, and where it is; sorted
    within each folder. Links to files and folders are followed.

    Raises:
        InputError: a folder cannot be read, or is a link to one that it lies in.
    """
    yield from _files_below(root, "", ())


def _files_below(folder: Path, prefix: str, above: Place) -> Iterator[tuple[str, Path]]:
    above = enter(folder, above)
    for entry in sorted(entries(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files_below(folder / entry.name, f"{prefix}{entry.name}/", above)
        elif entry.is_file():
            yield prefix + entry.name, folder / entry.name


def enter(folder: Path, above: Place) -> Place:
    """The place of what lies in a folder that lies in those ``above``.

    Raises:
        InputError: it cannot be read, or is a link to one of them.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise InputError(f"{folder} is a link to a folder that it lies in; remove the link")
    return (*above, identity)


def entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds, but for the system's files, in no order.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with os.scandir(folder) as found:
            return [entry for entry in found if not is_system_name(entry.name)]
    except OSError as error:
        raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
