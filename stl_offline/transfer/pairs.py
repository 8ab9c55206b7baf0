"""Images and their masks: found in a folder or a tar, matched by name, and checked before training.

A mask is a PNG of class ids, one per pixel, 8 or 16 bits (a palette counts by its indices). Two layouts are known:
``…/images/NAME.jpg`` with ``…/masks/NAME.png``, where the folders ``images`` and ``masks`` may lie at any depth, and
``NAME.jpg`` beside ``NAME.png``.
"""

import io
import logging
import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from stl_offline.errors import InputError
from stl_offline.files import canonical_json, sha256_bytes
from stl_offline.images.archive import TAR_SUFFIXES, tar_members
from stl_offline.images.common import files_below, is_image_name
from stl_offline.images.encode import content_hash
from stl_offline.labels.class_names import read_class_names
from stl_offline.pixels import IMAGE_FORMATS, ImageError, to_rgb
from stl_offline.progress import progress_bar

_LOGGER = logging.getLogger(__name__)

_IMAGES, _MASKS = "images", "masks"
_FORMS = "give a folder or a tar of images/NAME.jpg with masks/NAME.png, or of NAME.jpg beside NAME.png"
_PNG_DEPTH = 24  # where a PNG has its bits per pixel and channel
NO_CLASS = -1  # what a pixel without a class has in a decoded mask


@dataclass(frozen=True, slots=True)
class Pair:
    """An image and its mask. ``image`` and ``mask`` read their bytes; height and width in pixels."""

    key: str
    image: Callable[[], bytes]
    mask: Callable[[], bytes]
    height: int = 0
    width: int = 0


@dataclass(frozen=True)
class PairSet:
    """The pairs of a data set, all checked.

    class_names: in the order of the ids; ignore_id: what pixels without a class have in the files; pixels: int64 (K,),
    pixels of each class; fingerprint: of names, contents and classes.
    """

    pairs: tuple[Pair, ...]
    class_names: tuple[str, ...]
    ignore_id: int
    pixels: np.ndarray
    fingerprint: str

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def keys(self) -> Sequence[str]:
        return [pair.key for pair in self.pairs]

    def read(self, number: int) -> tuple[Image.Image, np.ndarray]:
        """RGB image, and int16 or int32 mask (H, W) with `NO_CLASS` where there is none."""
        pair = self.pairs[number]
        image, mask = read_image(pair), read_mask(pair, len(self.class_names), self.ignore_id)
        if not (pair.height, pair.width) == (image.height, image.width) == mask.shape:
            raise InputError(f"the image or the mask of {pair.key} has changed since it was checked; start again")
        return image, mask


def open_pairs(source: str | Path, classes: Sequence[str], ignore_id: int, split: str | None = None) -> PairSet:
    """Find the pairs of a folder or tar and check every mask.

    Args:
        classes: names in the order of the ids.
        ignore_id: the id of pixels without a class.
        split: keep only what lies below a folder of this name.

    Raises:
        InputError: nothing is there, an image lacks its mask, sizes differ, or a mask has other ids.
    """
    found = find_pairs(source, split)
    check = partial(_check, classes=len(classes), ignore_id=ignore_id)
    pixels = np.zeros(len(classes), dtype=np.int64)
    pairs, marks = [], []
    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool, progress_bar(len(found), "checking masks", "mask") as bar:
        for pair, counts, mark in pool.map(check, found):
            pairs.append(pair)
            marks.append(mark)
            pixels += counts
            bar.update()
    if not pixels.any():
        raise InputError(f"no pixel of the {len(pairs):,} masks of {source} has a class; check `ignore_id`={ignore_id}")
    fingerprint = sha256_bytes(canonical_json([marks, list(classes), ignore_id]))
    return PairSet(tuple(pairs), tuple(classes), ignore_id, pixels, fingerprint)


def class_list(classes: str) -> tuple[str, ...]:
    """Class names of a file (one per line), or given between commas; a single name has a comma behind it.

    Raises:
        InputError: no such file, no names, or one of them twice.
    """
    if classes and os.path.exists(classes):  # Path's raises where the names are longer than a file's
        return read_class_names(classes, "`classes`")
    if "," not in classes:
        raise InputError(
            f"there is no file {classes!r}; `classes` takes a text file with one name per line, or names between "
            "commas (a single one with a comma behind it)"
        )
    names = tuple(name.strip() for name in classes.removesuffix(",").split(","))
    if "" in names or len(set(names)) != len(names):
        raise InputError(f"`classes` must be different names between commas, got {classes!r}")
    return names


def find_pairs(source: str | Path, split: str | None = None) -> list[Pair]:
    """The pairs of a folder or tar, sorted by key (the image's path without its extension); contents are not read.

    Raises:
        InputError: nothing is there, or an image lacks its mask.
    """
    files = list_files(source)
    if split is not None:
        files = {name: load for name, load in files.items() if split in name.split("/")[:-1]}
        if not files:
            raise InputError(f"{source} has no folder {split!r} with files; check `split`")
    has_folders = any(_MASKS in name.split("/")[:-1] for name in files)
    mask_names: dict[str, str] = {}
    for name in files:
        if _is_mask(name, has_folders) and (other := mask_names.setdefault(_stem(name, _MASKS), name)) != name:
            raise InputError(f"{source} holds two masks for one image: {other} and {name}; keep one")
    masks = {stem: files[name] for stem, name in mask_names.items()}
    images: dict[str, tuple[str, Callable[[], bytes]]] = {}
    for name, load in files.items():
        inside = _IMAGES in name.split("/")[:-1] if has_folders else not name.lower().endswith(".png")
        if inside and is_image_name(posixpath.basename(name)):
            stem = _stem(name, _IMAGES)
            if stem in images:
                raise InputError(f"{source} holds two images for one mask: {images[stem][0]} and {name}; keep one")
            images[stem] = name, load
    if not images:
        raise InputError(f"{source} holds no images with masks; {_FORMS}")
    without = [name for stem, (name, _) in sorted(images.items()) if stem not in masks]
    if without:
        raise InputError(
            f"{len(without):,} of {len(images):,} images of {source} have no mask, for example {without[0]}"
        )
    idle = sorted(masks.keys() - images.keys())
    if has_folders and idle:
        _LOGGER.warning("%s masks of %s belong to no image, for example %s.png", f"{len(idle):,}", source, idle[0])
    pairs = [Pair(posixpath.splitext(name)[0], load, masks[stem]) for stem, (name, load) in images.items()]
    return sorted(pairs, key=lambda pair: pair.key)


def list_files(source: str | Path) -> dict[str, Callable[[], bytes]]:
    """Every file by its path below the folder or within the tar, and what reads it.

    Raises:
        InputError: it is neither a folder nor a tar, or a tar that holds a name twice.
    """
    path = Path(source)
    if path.is_dir():
        return {name: place.read_bytes for name, place in files_below(path)}
    if path.is_file() and path.name.endswith(TAR_SUFFIXES):
        found: dict[str, Callable[[], bytes]] = {}
        for member in tar_members(path):
            if member.name in found:
                raise InputError(f"{source} holds {member.name} twice; make the tar anew with one of them")
            found[member.name] = member.read
        return found
    problem = "is neither" if path.exists() else "does not exist"
    raise InputError(f"{source} {problem}; give a folder or a tar")


def _is_mask(name: str, has_folders: bool) -> bool:
    return name.lower().endswith(".png") and (not has_folders or _MASKS in name.split("/")[:-1])


def _stem(name: str, folder: str) -> str:
    """A path without its extension and without the last folder of this name."""
    *folders, base = name.split("/")
    if folder in folders:
        folders.pop(len(folders) - 1 - folders[::-1].index(folder))
    return "/".join([*folders, posixpath.splitext(base)[0]])


def _check(pair: Pair, classes: int, ignore_id: int) -> tuple[Pair, np.ndarray, list[object]]:
    """The pair with its size, pixels of each class, and what stands for its contents."""
    data, mask_data = pair.image(), pair.mask()
    image = open_image(pair.key, data)
    mask = decode_mask(mask_data, pair.key, classes, ignore_id)
    if mask.shape != (image.height, image.width):
        raise InputError(
            f"the image {pair.key} has {image.width}×{image.height} pixels and its mask "
            f"{mask.shape[1]}×{mask.shape[0]}; make them equal"
        )
    counts = np.bincount(mask[mask != NO_CLASS].ravel(), minlength=classes)
    sized = Pair(pair.key, pair.image, pair.mask, image.height, image.width)
    return sized, counts, [pair.key, content_hash(data), content_hash(mask_data)]


def read_image(pair: Pair) -> Image.Image:
    """The image in 8-bit RGB."""
    return decode_image(pair.key, pair.image())


def read_mask(pair: Pair, classes: int, ignore_id: int) -> np.ndarray:
    """The mask (H, W) with ids below ``classes`` and `NO_CLASS`."""
    return decode_mask(pair.mask(), pair.key, classes, ignore_id)


def check_ignore_id(ignore_id: int, class_names: Sequence[str]) -> None:
    """Raise InputError where the id of pixels without a class is that of a class."""
    if ignore_id < len(class_names):
        raise InputError(f"`ignore_id`={ignore_id} is the id of the class {class_names[ignore_id]!r}")


def decode_image(key: str, data: bytes) -> Image.Image:
    """An image in 8-bit RGB; raises `InputError` with its key where the bytes are none."""
    try:
        return to_rgb(open_image(key, data))
    except ImageError as error:
        raise InputError(f"the image {key}: {error}; {error.advice}") from error


def open_image(key: str, data: bytes) -> Image.Image:
    """An image that is not decoded yet; raises `InputError` where the bytes are none."""
    try:
        return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise InputError(f"{key} is not an image of a known format; repair or remove it") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the image {key} cannot be read: {error}; repair or remove it") from error


def decode_mask(data: bytes, key: str, classes: int, ignore_id: int) -> np.ndarray:
    """A PNG of class ids → int32 (H, W) with `NO_CLASS` in place of ``ignore_id``.

    Raises:
        InputError: it cannot be read, has colours instead of ids, or an id that is no class.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise ValueError(f"it has colours ({image.mode}) where class ids are expected")
            ids = np.asarray(image).astype(np.int32)
            if image.mode == "L":  # Pillow spreads grey of 2 and 4 bits over 0 to 255
                ids //= {2: 85, 4: 17}.get(data[_PNG_DEPTH], 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"the mask of {key} cannot be used: {error}") from error
    mask = np.where(ids == ignore_id, NO_CLASS, ids)
    if mask.size and mask.max() >= classes:
        raise InputError(
            f"the mask of {key} has the id {mask.max()}, but there are {classes} classes with ids 0 to {classes - 1}; "
            "add to `classes`, or give the id of pixels without a class as `ignore_id`"
        )
    return mask
