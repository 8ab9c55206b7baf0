"""ImageNet's test sets as their authors distribute them: which images each has, and what class each image is.

- ``imagenet``, ``a``, ``r``, ``sketch``: one folder per WordNet id (``n01440764``); ``a`` and ``r`` hold 200 classes.
- ``v2``: folders 0 to 999, each named by the class's number.
- ``real``: the validation images of ImageNet, each with a list of right classes (arXiv 2006.07159).
- ``c``: CORRUPTION/SEVERITY/WordNet id, as folders or as the authors' tars (``noise.tar``, ``blur.tar``, …), which are
  read where they lie.

A part is what gets scores of its own: a whole set, or one corruption at one severity.
"""

import io
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
from PIL import Image

from stl_offline.config_evaluate import SUITES
from stl_offline.errors import FormatError, InputError
from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS, EXTRA_CORRUPTIONS, SEVERITIES
from stl_offline.files import read_file, sha256_parts
from stl_offline.images.archive import TAR_SUFFIXES, Member, tar_members
from stl_offline.images.common import is_image_name, is_system_name
from stl_offline.images.folders import read_regular
from stl_offline.pixels import IMAGE_FORMATS

_LOG = logging.getLogger(__name__)

_WNID = re.compile(r"n\d{8}")
_VALIDATION_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.\w+", re.IGNORECASE)
_CORRUPTIONS = (*BENCHMARK_CORRUPTIONS, *EXTRA_CORRUPTIONS)
# Images of a part, as the authors count them.
_IMAGES = {"imagenet": 50_000, "a": 7_500, "r": 30_000, "c": 50_000, "sketch": 50_889, "v2": 10_000, "real": 50_000}


@dataclass(frozen=True)
class Files:
    """Images by number. names: below the part's folder; places: files, or members of tars; labels: int64 (n,), each
    image's class among ImageNet's 1,000.
    """

    names: list[str]
    places: list[str] | list[Member]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def load(self, index: int) -> Image.Image:
        """Image ``index``, its pixels not decoded yet. Raises `ImageError` and what Pillow raises."""
        place = self.places[index]
        data = place.read() if isinstance(place, Member) else read_regular(place)
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)


@dataclass(frozen=True)
class Part:
    """What is scored as one: suite, name (``gaussian_noise/3``; the suite's name where it is one part), its images.

    partial: some images may be missing; real_labels: each image's right classes, for ReaL.
    """

    suite: str
    name: str
    source: "_Folder | _Tars"
    prefix: str = ""
    partial: bool = False
    real_labels: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)

    def files(self) -> Files:
        """The images, listed when asked for: ImageNet-C has 4.75 million of them."""
        names, places = self.source.images(self.prefix)
        return Files(names, places, np.array([self._class_of(name) for name in names], dtype=np.int64))

    def fingerprint(self) -> tuple[str, int]:
        """SHA-256 over the source's place, names, sizes and times, for which a changed source has another one; and how
        many images it has.

        Raises:
            InputError: images are missing.
        """
        fingerprint, count = self.source.fingerprint(self.prefix)
        expected = _IMAGES[self.suite]
        if count != expected and not self.partial:
            where = f"{self.source.place}/{self.prefix}".rstrip("/")
            raise InputError(
                f"{where} has {count:,} images, the suite {self.suite} has {expected:,}; download it again, or score "
                "what is there (`partial`)"
            )
        return fingerprint, count

    def _class_of(self, name: str) -> int:
        if self.suite == "real":  # may lie in one folder; its labels are real_labels
            return -1
        folder = name.split("/")[0]
        return int(folder) if self.suite == "v2" else _numbers()[folder]


@dataclass(frozen=True)
class Suite:
    """A test set. classes: its classes among ImageNet's 1,000, ascending; parts: in the authors' order."""

    name: str
    classes: tuple[int, ...]
    parts: tuple[Part, ...]


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The WordNet ids of ImageNet's 1,000 classes, in the order of their numbers."""
    return tuple(timm.data.ImageNetInfo("imagenet-1k").label_names())


def subset_classes(name: str) -> tuple[int, ...]:
    """The 200 classes of ImageNet-A ("a") or ImageNet-R ("r"), as timm ships them, ascending."""
    indices = Path(_timm_info(), f"imagenet_{name}_indices.txt").read_text().split()
    return tuple(sorted(map(int, indices)))


def open_suite(name: str, place: str | Path, real_json: str | Path | None = None, *, partial: bool = False) -> Suite:
    """Check a test set's folders and list its parts.

    Args:
        name: one of `SUITES`.
        place: its folder; a tar of it; for "c", also a folder of the authors' tars.
        real_json: ReaL's labels (``real.json``); default: the copy that timm ships.
        partial: take a set that lacks some of its classes. Its figures are of the images that are there.

    Raises:
        InputError: nothing there, or folders that are not this test set's: missing classes, missing severities.
        FormatError: a tar or a JSON file that cannot be read.
    """
    if name not in SUITES:
        raise InputError(f"there is no suite {name!r}; suites: {', '.join(SUITES)}")
    source = _open_source(Path(place))
    if name == "c":
        return Suite(name, tuple(range(1000)), tuple(_corruption_parts(source, partial)))
    if name == "v2":
        _check_numbered(source, partial)
        return Suite(name, tuple(range(1000)), (Part(name, name, source, "", partial),))
    if name == "real":
        return Suite(name, tuple(range(1000)), (_real_part(source, real_json, partial),))
    expected = subset_classes(name) if name in ("a", "r") else tuple(range(1000))
    _check_classes(source, "", expected, name, partial)
    return Suite(name, expected, (Part(name, name, source, "", partial),))


def _corruption_parts(source: "_Folder | _Tars", partial: bool) -> Iterator[Part]:
    found = {name: source.folders(name) for name in source.folders("") if name in _CORRUPTIONS}
    if not found:
        raise InputError(
            f"{source.place} is not ImageNet-C: it has no folder or tar with corruptions such as "
            "gaussian_noise/1/n01440764"
        )
    for name in (name for name in _CORRUPTIONS if name in found):
        missing = [severity for severity in SEVERITIES if str(severity) not in found[name]]
        if missing:
            numbers = ", ".join(map(str, missing))
            raise InputError(f"{source.place}: {name} lacks severity {numbers}; 1 to 5 are expected")
        for severity in SEVERITIES:
            prefix = f"{name}/{severity}"
            _check_classes(source, prefix, tuple(range(1000)), "c", partial)
            yield Part("c", prefix, source, prefix, partial)


def _check_classes(source: "_Folder | _Tars", prefix: str, expected: Sequence[int], suite: str, partial: bool) -> None:
    """The class folders below ``prefix`` are the suite's, all of them."""
    wnids = [imagenet_wnids()[number] for number in expected]
    found = set(filter(_is_class, source.folders(prefix)))
    where = f"{source.place}/{prefix}".rstrip("/")
    missing, extra = sorted(set(wnids) - found), sorted(found - set(wnids))
    if len(missing) == len(wnids):
        raise InputError(
            f"{where} has no folders named by WordNet ids such as {wnids[0]}; the suite {suite} expects them"
        )
    if missing and not partial:
        raise InputError(
            f"{where} has {len(wnids) - len(missing):,} of the {len(wnids):,} classes of the suite {suite}; missing: "
            f"{_some(missing)}; `partial` scores the classes that are there"
        )
    if extra:
        raise InputError(f"{where} has {len(extra):,} folders that are no classes of the suite {suite}: {_some(extra)}")


def _check_numbered(source: "_Folder | _Tars", partial: bool) -> None:
    found = set(source.folders(""))
    missing = sorted(set(map(str, range(1000))) - found, key=int)
    named = any(map(_WNID.fullmatch, found))
    if named or len(missing) == 1000 or (missing and not partial):
        hint = "; folders named by WordNet ids belong to the suites imagenet and sketch" if named else ""
        raise InputError(
            f"{source.place} has {1000 - len(missing):,} of the folders 0 to 999 of ImageNet-V2; missing: "
            f"{_some(missing) or 'none'}{hint}"
        )


def _real_part(source: "_Folder | _Tars", real_json: str | Path | None, partial: bool) -> Part:
    path = Path(real_json) if real_json else Path(_timm_info(), "imagenet_real_labels.json")
    try:
        labels = json.loads(read_file(path))
        fine = isinstance(labels, list) and all(map(_is_class_list, labels))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON: {error}") from error
    if not fine:
        raise FormatError(f"{path} holds no ReaL labels: a list with one list of class numbers (0 to 999) per image")
    numbers = [_validation_number(source, name) for name in source.images("")[0]]
    if max(numbers) > len(labels):
        raise InputError(f"{path} has labels of {len(labels):,} images; image {max(numbers):,} is not among them")
    return Part("real", "real", source, "", partial, tuple(tuple(labels[number - 1]) for number in numbers))


def _is_class_list(row: Any) -> bool:
    return isinstance(row, list) and all(type(number) is int and 0 <= number < 1000 for number in row)


def _validation_number(source: "_Folder | _Tars", name: str) -> int:
    match = _VALIDATION_NAME.fullmatch(name.rpartition("/")[2])
    if not match or int(match[1]) < 1:
        raise InputError(
            f"{source.place}/{name} is not named as ImageNet's validation images are (ILSVRC2012_val_00000001.JPEG); "
            "ReaL's labels are found by these names"
        )
    return int(match[1])


def _open_source(place: Path) -> "_Folder | _Tars":
    if place.is_file():
        return _Tars(place, (place,))
    if not place.is_dir():
        raise InputError(f"there is no folder and no tar at {place}")
    entries = sorted(place.iterdir())
    tars = tuple(path for path in entries if path.name.endswith(TAR_SUFFIXES) and path.is_file())
    if not tars:
        return _Folder(place)
    folder = next((path.name for path in entries if path.is_dir() and not is_system_name(path.name)), None)
    if folder is None:
        return _Tars(place, tars)
    _LOG.warning(
        "of %s the folders are read (such as %s), and not the tars (such as %s); unpack all of them, or give a folder "
        "that holds tars alone",
        place,
        folder,
        tars[0].name,
    )
    return _Folder(place)


class _Folder:
    """A tree of files."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders below ``prefix``, sorted."""
        return sorted(entry.name for entry in self._entries(prefix) if entry.is_dir())

    def images(self, prefix: str) -> tuple[list[str], list[str]]:
        """Names below ``prefix`` and paths of the images in its class folders, else of those in no folder."""
        names = [name for name, _ in self._images(prefix)]
        if not names:
            raise InputError(f"{self.place / prefix} holds no images")
        return names, [str(self.place / prefix / name) for name in names]

    def fingerprint(self, prefix: str) -> tuple[str, int]:
        """SHA-256 over the place and each image's name, size and times; the number of images."""
        parts = [str(self.place.resolve() / prefix).encode()]
        for name, entry in self._images(prefix):
            try:
                state = entry.stat()
            except OSError as error:
                raise InputError(f"cannot read {entry.path}: {error.strerror}") from error
            parts.append(f"{name} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}".encode())
        return sha256_parts(*parts), len(parts) - 1

    def _images(self, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        folders = [f"{name}/" for name in self.folders(prefix) if _is_class(name)]
        for folder in folders or [""]:
            place = f"{prefix}/{folder}".strip("/")
            for entry in sorted(self._entries(place), key=lambda entry: entry.name):
                if is_image_name(entry.name) and not entry.is_dir():
                    yield folder + entry.name, entry

    def _entries(self, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.place / prefix) as entries:
                return [entry for entry in entries if not is_system_name(entry.name)]
        except OSError as error:
            raise InputError(f"cannot read the folder {self.place / prefix}: {error.strerror}") from error


class _Tars:
    """Trees in tars, read where they lie and taken as one tree. Compressed tars are unpacked to a temporary file."""

    def __init__(self, place: Path, paths: Sequence[Path]) -> None:
        self.place = place
        self._paths = tuple(paths)

    def folders(self, prefix: str) -> list[str]:
        """The names of the folders below ``prefix``, sorted."""
        inside = f"{prefix}/" if prefix else ""
        return sorted({name[len(inside) :].split("/")[0] for name in self._tree if name.startswith(inside)} - {""})

    def images(self, prefix: str) -> tuple[list[str], list[Member]]:
        """Names below ``prefix`` and members of the images in its class folders, else of those in no folder."""
        found = self._images(prefix)
        if not found:
            raise InputError(f"{self.place} holds no images below {prefix or 'its class folders'}")
        names = sorted(found)
        return names, [found[name] for name in names]

    def fingerprint(self, prefix: str) -> tuple[str, int]:
        """SHA-256 over each tar's place, size and times; the number of images."""
        parts = [prefix.encode()]
        for path in self._paths:
            state = path.stat()
            parts.append(f"{path.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}".encode())
        return sha256_parts(*parts), len(self._images(prefix))

    def _images(self, prefix: str) -> dict[str, Member]:
        inside = f"{prefix}/" if prefix else ""
        classes = {
            folder: f"{folder[len(inside) :]}/"
            for folder in self._tree
            if folder.startswith(inside) and _is_class(folder[len(inside) :])
        } or {prefix: ""}
        return {
            inner + name: member
            for folder, inner in classes.items()
            for name, member in self._tree.get(folder, {}).items()
        }

    @cached_property
    def _tree(self) -> dict[str, dict[str, Member]]:
        """Folder → file name → member of each image. The tree may lie below folders that it is all in."""
        tree: dict[str, dict[str, Member]] = {}
        for path in self._paths:
            for member in tar_members(path):
                folder, _, name = member.name.rpartition("/")
                if is_image_name(name):
                    tree.setdefault(folder, {})[name] = member
        while tree and not any(_is_known(folder.split("/")[0]) for folder in tree):
            tops = {folder.split("/")[0] for folder in tree}
            if len(tops) > 1 or "" in tops:  # images in no folder
                break
            tree = {folder.partition("/")[2]: members for folder, members in tree.items()}
        return tree


def _is_class(folder: str) -> bool:
    return bool(_WNID.fullmatch(folder)) or (folder.isdecimal() and folder.isascii() and int(folder) < 1000)


def _is_known(folder: str) -> bool:
    return _is_class(folder) or folder in _CORRUPTIONS


def _timm_info() -> Path:
    return Path(timm.data.__file__).parent / "_info"


@cache
def _numbers() -> dict[str, int]:
    return {wnid: number for number, wnid in enumerate(imagenet_wnids())}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
