"""Where images come from: a folder per class, webdataset tars, or any timm reader.

`open_source` finds out which of them a name stands for, and opens it. Every source has a fixed order, class names
known before the first image is read, and images whose bytes are read when asked for (so threads can do it).
"""

import glob
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from webdataset.shardlists import expand_urls

from stl_offline.errors import InputError
from stl_offline.images.archive import TAR_SUFFIXES
from stl_offline.images.classes import ClassChoice
from stl_offline.images.common import Source, SourceImage
from stl_offline.images.folders import FolderSource, folder_files
from stl_offline.images.tar_stream import TarStreams
from stl_offline.images.tars import TarSource
from stl_offline.images.timm_readers import TIMM_PREFIXES, TimmSource, timm_files
from stl_offline.remote import expand_remote, is_address, remote_state, shown

# Of so many files, or of one large file in so many places, this many bytes at both ends enter a source's state.
_SAMPLED_FILES = 1024
_SAMPLED_BYTES = 4096
# Files of a store that are looked at at the same time.
_LOOKS = 16

_FORMS = (
    "give a folder with one folder of images per class, tars such as 'train-{000..063}.tar' or "
    "'s3://bucket/train-{000..063}.tar', or a timm reader such as 'timm:hfds/NAME?split=train'"
)


def open_source(
    spec: str | Path, class_names: Sequence[str] | None = None, class_map: Mapping[str, str] | None = None
) -> Source:
    """Open a folder tree, tars (brace patterns, or * and ?), or a timm reader (``timm:NAME?option=value``).

    Args:
        spec: where the images are.
        class_names: the class list to use (a training set's, for a validation set); else that which is found.
        class_map: new names of the classes that are found, as for tars whose classes are numbers.

    Raises:
        InputError: nothing there, no images, classes that ``class_names`` or ``class_map`` lacks, doubled keys,
            a tar that is cut off or has hostile names.
    """
    found = open_any(spec, class_names, class_map)
    if isinstance(found, TarStreams):
        raise InputError(
            f"{shown(os.fspath(spec))} is not on this machine, and here its images are needed in any order; pack them "
            "first: stl-offline pack SRC DEST.beton"
        )
    return found


def listed(source: Source) -> list[SourceImage]:
    """The images of a source, whose bytes are read when asked for.

    Raises:
        InputError: a timm reader that gives images one after the other only.
    """
    return source.listed() if isinstance(source, TimmSource) else list(source)


def open_any(
    spec: str | Path, class_names: Sequence[str] | None = None, class_map: Mapping[str, str] | None = None
) -> Source | TarStreams:
    """`open_source` for what reads each image once, in the source's order: takes tars at addresses, too."""
    choice = ClassChoice(None if class_names is None else tuple(class_names), class_map)
    kind, place = resolve(spec)
    if kind == "timm":
        return TimmSource(place, choice)
    if kind == "folder":
        return FolderSource(place, choice)
    if kind == "remote":
        return TarStreams(place, choice)
    return TarSource(place, choice)


def find_tars(spec: str | Path) -> list[str] | None:
    """The paths or addresses of the tars that a pattern names, in its order; None where it names something else.

    Raises:
        InputError: as `open_source`.
    """
    if os.fspath(spec).endswith(".beton"):
        return None
    kind, place = resolve(spec)
    return [os.fspath(each) for each in place] if kind in ("tar", "remote") else None


def source_state(spec: str | Path) -> str:
    """A name (hex) for a source and what it holds, without reading all of it: equal only for the same, unchanged files.

    It stands for the place, and for each file's name, inode, size and times of content and status, which no ``touch``
    sets. Because a mounted image or a container layer can repeat all of these, it also stands for some of the bytes.
    """
    kind, place = resolve(spec)
    marks: list[str] = []
    if kind == "remote":
        with ThreadPoolExecutor(_LOOKS) as pool:
            states = list(pool.map(remote_state, place))
        # An address may be signed anew each time; what it names is the same.
        return xxhash.xxh3_128_hexdigest(json.dumps([kind, list(map(shown, place)), states]).encode())
    if kind == "timm":
        files, marks = timm_files(place)
        root, named = place, [(name, name) for name in files]
    elif kind == "folder":
        root = os.path.realpath(place)
        named = [(file.key, file.entry.path) for file in folder_files(place)[0]]
    else:
        root, named = "", [(os.path.realpath(path), str(path)) for path in place]
    digest = xxhash.xxh3_128(json.dumps([kind, root, marks]).encode())
    sampled = set(np.linspace(0, len(named) - 1, min(len(named), _SAMPLED_FILES)).astype(np.int64).tolist())
    blocks = max(2, _SAMPLED_FILES // max(1, len(named)))
    for number, (name, path) in enumerate(sorted(named)):
        digest.update(json.dumps([name, *_status(path)]).encode())
        if number in sampled:
            digest.update(_some_bytes(path, blocks))
    return digest.hexdigest()


def _status(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)
    except OSError:
        try:
            status = os.lstat(path)  # of a dangling link, which is a broken image
        except OSError:
            return ()
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _some_bytes(path: str, blocks: int) -> bytes:
    """``blocks`` pieces of a file, evenly spread from its first to its last bytes; none of what is no regular file."""
    try:
        if not os.path.isfile(path):
            return b""
        with open(path, "rb", buffering=0) as stream:
            last = max(0, os.fstat(stream.fileno()).st_size - _SAMPLED_BYTES)
            places = sorted({last * number // (blocks - 1) for number in range(blocks)})
            return b"".join(os.pread(stream.fileno(), _SAMPLED_BYTES, place) for place in places)
    except OSError:
        return b""


def resolve(spec: str | Path) -> tuple[str, str | Path | list[Path]]:
    """("timm", words), ("folder", path), ("tar", paths) or ("remote", addresses)."""
    text = os.fspath(spec)
    if text.startswith(("file://", "local://")):
        return resolve(text.partition("://")[2])
    if text.startswith("timm:"):
        return "timm", text.removeprefix("timm:")
    path = Path(text)
    if path.is_dir():
        return "folder", path
    if path.is_file():
        if text.endswith(TAR_SUFFIXES):
            return "tar", [path]
        if path.suffix == ".beton":
            raise InputError(f"{text} is packed already")
        raise InputError(f"{text} is neither a folder nor a tar; {_FORMS}")
    if text.startswith(TIMM_PREFIXES):
        return "timm", text
    if text.startswith("pipe:"):
        raise InputError(f"{text} is a command, which is not run; give the tars' addresses")
    if is_address(text):
        return "remote", _remote_tars(text)
    paths = _expand(text)
    if not paths:
        raise InputError(f"there is nothing at {text}; {_FORMS}")
    missing = [name for name in paths if not os.path.isfile(name)]
    if missing:
        if os.path.exists(missing[0]):
            raise InputError(f"{missing[0]} is not a regular file; {_FORMS}")
        if len(paths) == 1:
            raise InputError(f"there is no tar {text}; {_FORMS}")
        raise InputError(f"{len(missing):,} of the {len(paths):,} tars of {text} are missing, for example {missing[0]}")
    odd = [name for name in paths if not name.endswith(TAR_SUFFIXES)]
    if odd:
        raise InputError(f"{odd[0]} is not a tar; {_FORMS}")
    return "tar", [Path(name) for name in paths]


def _remote_tars(text: str) -> list[str]:
    """The addresses that a pattern with braces and * names, in the pattern's order."""
    try:
        urls = [found for url in expand_urls(text) for found in expand_remote(url)]
    except (AssertionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"the pattern {shown(text)} cannot be expanded: {error}") from error
    odd = [url for url in urls if not is_address(url) or not shown(url).endswith(TAR_SUFFIXES)]
    if odd:
        raise InputError(f"{shown(odd[0])} is not the address of a tar; {_FORMS}")
    return urls


def _expand(text: str) -> list[str]:
    """The files that a pattern names, in the pattern's order; none where it is no pattern.

    What exists under its literal name is never taken for a pattern. Else braces are expanded, then * and ?.
    """
    paths = []
    for part in text.split("::"):
        folder, rest = _literal_folder("", part)
        try:
            names = expand_urls(rest) if rest else [rest]
        except (AssertionError, ValueError) as error:  # ${NAME} without a value; a brace without its partner
            raise InputError(f"the pattern {text} cannot be expanded: {error}") from error
        for name in names:
            paths += _glob(folder, name)
    return paths if len(paths) > 1 or text.endswith(TAR_SUFFIXES) else []


def _glob(folder: str, name: str) -> list[str]:
    """The paths that ``name`` matches below ``folder``; what matches nothing, and is no pattern, is given as it is."""
    more, pattern = _literal_folder(folder, name)
    if os.path.lexists(more + pattern) or not glob.has_magic(pattern):
        return [more + pattern]
    head, slash, tail = pattern.partition("/")
    if not slash:
        return sorted(glob.glob(glob.escape(more) + pattern))
    folders = [path for path in sorted(glob.glob(glob.escape(more) + head)) if os.path.isdir(path)]
    return [found for path in folders for found in _glob(path + "/", tail) if os.path.lexists(found)]


def _literal_folder(folder: str, name: str) -> tuple[str, str]:
    """``folder`` with as much of ``name`` as exists under it as it is written (ends in "/", or is empty); the rest."""
    end = 0
    while (slash := name.find("/", end)) >= 0 and os.path.isdir(folder + name[: slash + 1]):
        end = slash + 1
    return folder + name[:end], name[end:]
