"""Where the objects of images are: masks and boxes as data sets give them, read one by one."""

import io
import json
import os
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.files import read_file
from stl_offline.images.common import files_below
from stl_offline.images.encode import IMAGE_SUFFIXES
from stl_offline.images.voc import MOST_BYTES, read_voc

BOX_SIDE = 256  # pixels per side of the mask that a box becomes; boxes are exact to half a pixel of it
_JSON_BYTES = 1 << 30
_SUFFIXES = IMAGE_SUFFIXES | {".xml"}


def read_masks(source: str | Path, sizes: Mapping[str, tuple[int, int]] | None = None) -> Mapping[str, np.ndarray]:
    """Masks by an image's key without its extension or with it: bool (H, W) over the whole image, True in the object.

    Args:
        source: a folder that holds, at the place of each image, ``NAME.png`` (every pixel but 0 is the object) or
            ``NAME.xml`` (Pascal VOC boxes, as ImageNet's); an ``.npz`` file with ``keys`` (JSON in uint8) and
            ``masks`` (n, H, W), as the demo writes; or a ``.json`` file of one box or a list of boxes per key,
            [left, top, right, bottom]: shares of the image's sides where no number of the file is above 1, pixels
            otherwise. Right and bottom are edges: the whole of a 64-pixel image is [0, 0, 64, 64].
        sizes: (width, height) of every image by its key, for boxes in pixels.

    Raises:
        InputError: it does not exist, or is none of these. A mask that cannot be read raises it when it is looked up.
    """
    path = Path(source)
    if path.is_dir():
        return _Folder(path)
    kind = path.suffix.lower()
    if kind not in (".npz", ".json") or not path.is_file():
        problem = "does not exist" if not path.exists() else "is none of these"
        raise InputError(f"masks come from a folder, an .npz file or a .json file; {path} {problem}")
    return _read_npz(path) if kind == ".npz" else _read_json(path, sizes)


class _ByStem(Mapping[str, np.ndarray]):
    """A mapping whose keys are looked up as they are, then without the extension of an image or a mask."""

    def __init__(self, found: Mapping[str, object]) -> None:
        self._whole = dict(found)
        self._stems: dict[str, object] = {}
        self._doubled: set[str] = set()
        for key, value in found.items():
            stem, suffix = os.path.splitext(key)
            if suffix.lower() in _SUFFIXES and self._stems.setdefault(stem, value) is not value:
                self._doubled.add(stem)

    def read(self, key: str, value: object) -> np.ndarray:
        assert isinstance(value, np.ndarray)
        return value

    def __getitem__(self, key: str) -> np.ndarray:
        stem = _stem(key)
        for table, name in ((self._whole, key), (self._stems, key), (self._whole, stem), (self._stems, stem)):
            if name in table:
                if table is self._stems and name in self._doubled:
                    raise InputError(f"there are two masks for {name}; keep one of them")
                return self.read(key, table[name])
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._whole)

    def __len__(self) -> int:
        return len(self._whole)


class _Folder(_ByStem):
    """Files of masks and boxes. Links are followed, as for images."""

    def __init__(self, root: Path) -> None:
        found: dict[str, object] = {}
        stems: set[str] = set()
        for key, place in files_below(root):
            if key.lower().endswith((".png", ".xml")):
                if _stem(key) in stems:
                    raise InputError(f"{root} holds two masks for {_stem(key)}; keep one of them")
                stems.add(_stem(key))
                found[key] = place
        if not found:
            raise InputError(f"{root} holds no masks: no file in it ends in .png or .xml")
        super().__init__(found)

    def read(self, key: str, value: object) -> np.ndarray:
        place = Path(str(value))
        try:
            return _read_png(place) if place.suffix.lower() == ".png" else _read_voc(place)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"the mask {place} cannot be read: {error}; repair or remove it") from error


class _Boxes(_ByStem):
    """Boxes as shares of the image's sides, or in pixels of the images with the given sizes."""

    def __init__(self, found: Mapping[str, object], sizes: Mapping[str, tuple[int, int]] | None) -> None:
        super().__init__(found)
        self._sizes = sizes

    def read(self, key: str, value: object) -> np.ndarray:
        boxes = value if isinstance(value, list) and value and isinstance(value[0], list) else [value]
        unit = "as shares of the image's sides in [0, 1]"
        try:
            sides = np.array(boxes, dtype=np.float64).reshape(-1, 4)
            if self._sizes is not None:
                width, height = self._sizes[key]
                unit = f"in pixels of the image's {width}×{height}"
                sides = sides / (width, height, width, height)
            return _draw(sides)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the boxes of {key!r} must be [left, top, right, bottom] {unit}, got {str(value)[:80]}"
            ) from error


def _stem(key: str) -> str:
    """A key without the extension of an image or a mask."""
    stem, suffix = os.path.splitext(key)
    return stem if suffix.lower() in _SUFFIXES else key


def _read_png(place: Path) -> np.ndarray:
    with warnings.catch_warnings(), Image.open(io.BytesIO(read_file(place)), formats=("PNG",)) as image:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            values = np.asarray(image)
            has_alpha = image.mode in ("LA", "RGBA")
        except Image.DecompressionBombWarning as warning:
            raise ValueError(str(warning)) from warning
    if has_alpha:  # mostly opaque everywhere, so it says nothing of objects; what cannot be seen is none
        return values[..., :-1].any(-1) & (values[..., -1] > 0)
    return values.reshape(*values.shape[:2], -1).any(-1)


def _read_voc(place: Path) -> np.ndarray:
    size, boxes = read_voc(read_file(place, MOST_BYTES + 1))
    if size is None or min(size) <= 0:
        raise ValueError(f"<size> must give the image's width and height, got {size}")
    sides = np.array([box.sides for box in boxes], dtype=np.float64).reshape(-1, 4)
    return _draw((sides / (*size, *size)).clip(0, 1))


def _draw(boxes_n4: np.ndarray) -> np.ndarray:
    """The union of boxes, as a mask of a fixed size. Raises ValueError for a box that is none."""
    mask = np.zeros((BOX_SIDE, BOX_SIDE), dtype=bool)
    for left, top, right, bottom in boxes_n4.tolist():
        if not (0 <= left <= right <= 1 and 0 <= top <= bottom <= 1):
            raise ValueError(f"[{left:g}, {top:g}, {right:g}, {bottom:g}] is no box")
        rows, columns = (
            slice(round(start * BOX_SIDE), round(end * BOX_SIDE)) for start, end in ((top, bottom), (left, right))
        )
        mask[rows, columns] = True
    return mask


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            keys, masks = json.loads(stored["keys"].tobytes()), stored["masks"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no masks: {error}") from error
    if not (isinstance(keys, list) and all(isinstance(key, str) for key in keys) and len(set(keys)) == len(keys)):
        raise InputError(f"{path} holds no masks: `keys` is not a list of different names")
    if masks.ndim != 3 or masks.shape[0] != len(keys) or 0 in masks.shape:
        raise InputError(f"{path} holds no masks: {len(keys)} keys and masks of the shape {masks.shape}")
    return _ByStem(dict(zip(keys, masks.astype(bool), strict=True)))


def _read_json(path: Path, sizes: Mapping[str, tuple[int, int]] | None) -> Mapping[str, np.ndarray]:
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has more than {_JSON_BYTES:,} bytes")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"{path} must hold one JSON object: key → [left, top, right, bottom]")
    if not any(number > 1 for value in found.values() for number in _numbers(value)):
        return _Boxes(found, None)
    if sizes is None:
        raise InputError(
            f"{path} has boxes in pixels, and the images' sizes are not known here; divide left and right by the "
            "image's width, top and bottom by its height"
        )
    return _Boxes(found, sizes)


def _numbers(value: object) -> Iterator[float]:
    """The numbers of a box, or of a list of boxes; whatever else is there is refused when it is looked up."""
    for each in value if isinstance(value, list) else ():
        if isinstance(each, list):
            yield from _numbers(each)
        elif isinstance(each, int | float):
            yield each
