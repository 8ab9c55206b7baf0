"""Where images come from: a folder per class, webdataset tars, or any timm reader.

`open_source` looks at the words that the user gave and opens the right one. Every source has a fixed order, class names
known before the first image is read, and images whose bytes are read when asked for (so threads can do it).
"""

import glob
import json
import os
from collections.abc import Sequence
from pathlib import Path

import xxhash
from webdataset.shardlists import expand_urls

from stl_offline.errors import InputError
from stl_offline.images.common import Source
from stl_offline.images.folders import FolderSource, folder_files
from stl_offline.images.tars import TAR_SUFFIXES, TarSource
from stl_offline.images.timm_readers import TIMM_PREFIXES, TimmSource

_FORMS = (
    "give a folder with one folder of images per class, tars such as 'train-{000..063}.tar', "
    "or a timm reader such as 'timm:hfds/NAME?split=train'"
)


def open_source(spec: str | Path, class_names: Sequence[str] | None = None) -> Source:
    """Open a folder tree, tars (brace patterns, or * and ?), or a timm reader (``timm:NAME?option=value``).

    Args:
        spec: where the images are.
        class_names: the class list to use (a training set's, for a validation set); else that which is found.

    Raises:
        InputError: nothing there, no images, one class only, classes that ``class_names`` lacks, doubled keys,
            a tar that is cut off or has hostile names.
    """
    kind, place = _resolve(spec)
    if kind == "timm":
        return TimmSource(place, class_names)
    if kind == "folder":
        return FolderSource(place, class_names)
    return TarSource(place, class_names)


def source_state(spec: str | Path) -> str:
    """A name (hex) for what a source holds: of its files' names, sizes and times, without reading them.

    For a timm reader, whose files are not known, it stands for the words given.
    """
    kind, place = _resolve(spec)
    if kind == "timm":
        rows = [[place]]
    elif kind == "folder":
        found = ((key, entry.stat()) for key, entry in folder_files(place))
        rows = sorted([key, status.st_size, status.st_mtime_ns] for key, status in found)
    else:
        rows = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in place]
    return xxhash.xxh3_128_hexdigest(json.dumps([kind, rows]).encode())


def _resolve(spec: str | Path) -> tuple[str, str | Path | list[Path]]:
    """("timm", words), ("folder", path) or ("tar", paths)."""
    text = os.fspath(spec)
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
    if "://" in text or text.startswith("pipe:"):
        raise InputError(f"{text} is not on this machine; copy the images here first")
    paths = _expand(text)
    if not paths:
        raise InputError(f"there is nothing at {text}; {_FORMS}")
    missing = [name for name in paths if not os.path.isfile(name)]
    if missing:
        if len(paths) == 1:
            raise InputError(f"there is no tar {text}; {_FORMS}")
        raise InputError(f"{len(missing):,} of the {len(paths):,} tars of {text} are missing, for example {missing[0]}")
    odd = [name for name in paths if not name.endswith(TAR_SUFFIXES)]
    if odd:
        raise InputError(f"{odd[0]} is not a tar; {_FORMS}")
    return "tar", [Path(name) for name in paths]


def _expand(text: str) -> list[str]:
    """The files that a pattern names, in the pattern's order; none where it is no pattern."""
    try:
        names = expand_urls(text)
    except (AssertionError, ValueError) as error:  # ${NAME} without a value; a brace without its partner
        raise InputError(f"the pattern {text} cannot be expanded: {error}") from error
    paths = []
    for name in names:
        paths += sorted(glob.glob(name)) if glob.has_magic(name) else [name]
    return paths if len(paths) > 1 or text.endswith(TAR_SUFFIXES) else []
