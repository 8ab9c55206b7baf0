"""Images with boxes of objects, from Pascal VOC's XML files or a COCO JSON file, which may have masks, too.

Boxes are (left, top, right, bottom) in pixels from the image's upper left corner; COCO's are a corner and a size. What
a file marks as difficult or as a crowd is background in training, and in the scores neither missed nor wrongly found.
Boxes without an area are left out. All but the images' pixels is checked before training.

n: objects of an image.
"""

import json
import logging
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.files import canonical_json, sha256_bytes
from stl_offline.images.common import is_image_name
from stl_offline.images.encode import content_hash
from stl_offline.images.voc import read_voc
from stl_offline.transfer.outlines import RunLengths, run_lengths
from stl_offline.transfer.pairs import decode_image, list_files, open_image

_LOGGER = logging.getLogger(__name__)

_JSON_BYTES = 1 << 30
_VOC_IMAGES = {"images", "jpegimages"}  # folders, in any case


@dataclass(frozen=True, slots=True)
class Objects:
    """boxes_n4: float32; class_ids: int64 (n,); masks: n of them, or None where they were not asked for."""

    boxes_n4: np.ndarray
    class_ids: np.ndarray
    masks: tuple[RunLengths, ...] | None = None

    def __len__(self) -> int:
        return len(self.class_ids)

    def marks(self) -> list[Any]:
        """What stands for them in a fingerprint."""
        marks = [self.boxes_n4.tolist(), self.class_ids.tolist()]
        return marks if self.masks is None else [*marks, [each["counts"].decode() for each in self.masks]]


@dataclass(frozen=True, slots=True)
class BoxedImage:
    """An image. image: reads its bytes; objects: what to find in it; ignored: crowds and difficult objects."""

    key: str
    image: Callable[[], bytes]
    objects: Objects
    ignored: Objects

    def read(self) -> Image.Image:
        """The image in 8-bit RGB."""
        return decode_image(self.key, self.image())


@dataclass(frozen=True)
class BoxSet:
    """The images of a data set. fingerprint: of names, contents, boxes and classes."""

    images: tuple[BoxedImage, ...]
    class_names: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.images)

    @property
    def keys(self) -> Sequence[str]:
        return [image.key for image in self.images]


def open_boxes(
    source: str | Path,
    class_names: Sequence[str],
    annotations: str | None = None,
    split: str | None = None,
    *,
    masks: bool = False,
) -> BoxSet:
    """The images of a folder or tar with their boxes.

    Args:
        class_names: the classes, in the order of their ids.
        annotations: a COCO JSON file; None takes Pascal VOC's ``NAME.xml``, beside ``NAME.jpg`` or in a folder
            ``annotations`` (or ``Annotations``) where the images lie in ``images`` (or ``JPEGImages``).
        split: keep only what lies below a folder of this name.
        masks: read the objects' masks, too, which a COCO JSON file has.

    Raises:
        InputError: nothing is there, an image lacks its file or shares it with another, a file cannot be read, has
            other classes or is for images of another size, a box leaves its image, or an object has no mask.
    """
    files = list_files(source)
    images = {
        name: load
        for name, load in files.items()
        if is_image_name(posixpath.basename(name)) and split in (None, *name.split("/")[:-1])
    }
    if not images:
        raise InputError(f"{source} holds no images" + ("" if split is None else f" below a folder {split!r}"))
    ids = {name: number for number, name in enumerate(class_names)}
    read = _voc(source, files, images, ids) if annotations is None else _coco(Path(annotations), images, ids)
    found, marks, empty = [], [], []
    for name, (rows, size) in sorted(read.items()):
        data = images[name]()
        image = open_image(name, data)
        if size not in (None, (0, 0), image.size):  # some tools write zeros
            raise InputError(
                f"{name} has {image.width}×{image.height} pixels, and its annotations are for {size[0]:g}×{size[1]:g}"
            )
        kept = [row for row in rows if _has_area(row, name, image)]
        empty += [name] * (len(rows) - len(kept))
        objects, ignored = (
            _objects(name, [row for row in kept if row.is_ignored is each], image, masks) for each in (False, True)
        )
        found.append(BoxedImage(posixpath.splitext(name)[0], images[name], objects, ignored))
        marks.append([name, content_hash(data), *objects.marks(), *(ignored.marks() if len(ignored) else ())])
    if not any(len(image.objects) for image in found):
        raise InputError(f"the {len(found):,} images of {source} have no boxes")
    if empty:
        _LOGGER.warning("boxes of %s without an area are left out: %s, for example in %s", source, len(empty), empty[0])
    return BoxSet(tuple(found), tuple(class_names), sha256_bytes(canonical_json([marks, list(class_names)])))


class _Row(NamedTuple):
    """An object. box: its sides in pixels; segmentation: what a COCO file has as its mask."""

    box: tuple[float, float, float, float]
    class_id: int
    is_ignored: bool
    segmentation: Any = None


# An image's objects, and its width and height where they are given.
_Rows = tuple[list[_Row], tuple[float, float] | None]


def _has_area(row: _Row, name: str, image: Image.Image) -> bool:
    """Whether a box has one, to float32's precision; COCO's own files have a few that do not."""
    left, top, right, bottom = row.box
    if not (-1 <= left <= right <= image.width + 1 and -1 <= top <= bottom <= image.height + 1):
        sides = ", ".join(f"{side:g}" for side in row.box)
        raise InputError(
            f"{name} has a box of the sides {sides} (left, top, right, bottom), which is not within its "
            f"{image.width}×{image.height} pixels"
        )
    return bool(np.float32(left) < np.float32(right) and np.float32(top) < np.float32(bottom))


def _objects(name: str, rows: list[_Row], image: Image.Image, with_masks: bool) -> Objects:
    masks = None
    if with_masks:
        try:
            masks = tuple(run_lengths(row.segmentation, image.height, image.width) for row in rows)
        except ValueError as error:
            raise InputError(f"the masks of {name} cannot be used: {error}") from error
    boxes_n4 = np.array([row.box for row in rows], np.float32).reshape(-1, 4)
    return Objects(boxes_n4, np.array([row.class_id for row in rows], np.int64), masks)


def _voc(source: object, files: dict, images: dict, ids: dict[str, int]) -> dict[str, _Rows]:
    """Of the images in folders "images" or "JPEGImages" where there are such, else of all: others are masks."""

    def stem(name: str) -> str:
        *path, base = posixpath.splitext(name)[0].split("/")
        return "/".join([*(each for each in path if each.lower() not in {*_VOC_IMAGES, "annotations"}), base])

    placed = [name for name in images if _VOC_IMAGES & set(name.lower().split("/")[:-1])] or list(images)
    by_stem: dict[str, str] = {}
    for name in files:
        if name.lower().endswith(".xml") and (other := by_stem.setdefault(stem(name), name)) != name:
            raise InputError(f"{source} holds two XML files for one image: {other} and {name}; keep one")
    owner: dict[str, str] = {}
    for name in placed:
        other = owner.setdefault(stem(name), name)
        if other != name:
            raise InputError(f"{source} holds two images for one XML: {other} and {name}; keep one")
    without = [name for each, name in owner.items() if each not in by_stem]
    if without:
        raise InputError(
            f"{len(without):,} of {len(placed):,} images of {source} have no XML, for example {without[0]}"
        )
    return {name: _read_voc(by_stem[each], files[by_stem[each]](), ids) for each, name in owner.items()}


def _read_voc(name: str, data: bytes, ids: dict[str, int]) -> _Rows:
    rows = []
    try:
        size, found = read_voc(data)
        for box in found:
            if box.class_name in ids:
                rows.append(_Row(box.sides, ids[box.class_name], box.is_difficult))
            elif not box.is_difficult:
                raise ValueError(f"the class {box.class_name!r} is not among `classes`: {', '.join(ids)}")
    except ValueError as error:
        raise InputError(f"the annotations {name} cannot be used: {error}") from error
    return rows, size


def _coco(path: Path, images: dict, ids: dict[str, int]) -> dict[str, _Rows]:
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has more than {_JSON_BYTES:,} bytes")
        content = json.loads(path.read_bytes())
        listed = _by_id(content, "images", "file_name")
        classes = _by_id(content, "categories", "name")
        names = {number: each["file_name"] for number, each in listed.items()}
        found: dict[str, list[_Row]] = {name: [] for name in names.values()}
        if len(found) < len(names):
            raise ValueError("it lists an image twice")
        for each in content["annotations"]:
            for part, known in (("image_id", names), ("category_id", classes)):
                if each[part] not in known:
                    raise ValueError(f"an annotation has the {part} {each[part]!r:.40}, which it does not list")
            if not isinstance(each["bbox"], list):
                raise ValueError(f"a bbox must be a list of four numbers, got {each['bbox']!r:.40}")
            left, top, width, height = map(float, each["bbox"])
            class_name = classes[each["category_id"]]["name"]
            is_crowd = bool(each.get("iscrowd"))
            if class_name in ids:
                box = (left, top, left + width, top + height)
                row = _Row(box, ids[class_name], is_crowd, each.get("segmentation"))
                found[names[each["image_id"]]].append(row)
            elif not is_crowd:
                raise ValueError(f"the class {class_name!r} is not among `classes`: {', '.join(ids)}")
        sizes = {
            each["file_name"]: (float(each["width"]), float(each["height"]))
            for each in listed.values()
            if "width" in each and "height" in each
        }
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise InputError(f"the annotations {path} cannot be used as COCO's: {kind}{error}") from error
    # File names are relative to the folder of images, which may lie anywhere within the source.
    placed: dict[str, _Rows] = {}
    owner: dict[str, str] = {}
    for name in images:
        parts = name.split("/")
        entry = next((tail for start in range(len(parts)) if (tail := "/".join(parts[start:])) in found), None)
        if entry is None:
            continue
        if entry in owner:
            raise InputError(
                f"{entry} of {path} may be {owner[entry]} or {name}; choose with `split`, or give the folder"
            )
        owner[entry] = name
        placed[name] = found[entry], sizes.get(entry)
    if len(placed) < len(found):
        raise InputError(f"{len(found) - len(placed):,} of the {len(found):,} images of {path} are not in the data")
    if len(placed) < len(images):
        left_out = len(images) - len(placed)
        _LOGGER.info("%s of %s images are left out: %s does not list them", f"{left_out:,}", f"{len(images):,}", path)
    return placed


def _by_id(content: dict, part: str, name: str) -> dict[Any, dict]:
    """The entries of a part of a COCO file by their ids; each has a name."""
    found: dict[Any, dict] = {}
    for each in content[part]:
        if each["id"] in found:
            raise ValueError(f"two of its {part} have the id {each['id']!r:.40}")
        if not isinstance(each[name], str):
            raise ValueError(f"a {name} must be text, got {each[name]!r:.40}")
        found[each["id"]] = each
    return found
