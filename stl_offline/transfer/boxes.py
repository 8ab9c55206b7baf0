"""Images with boxes of objects, from Pascal VOC's XML files or a COCO JSON file, which may have masks, too.

Boxes are (left, top, right, bottom) in pixels from the image's upper left corner; COCO's are a corner and a size. What
a file marks as difficult or as a crowd is left out. All is checked before training.
"""

import json
import logging
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True, slots=True)
class BoxedImage:
    """An image and its objects. image: reads its bytes; boxes_n4: float32; class_ids: int64 (n,); masks: n of them, or
    None where they were not asked for."""

    key: str
    image: Callable[[], bytes]
    boxes_n4: np.ndarray
    class_ids: np.ndarray
    masks: tuple[RunLengths, ...] | None = None

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
        InputError: nothing is there, an image lacks its file, a file cannot be read, has other classes or is for images
            of another size, or an object has no mask.
    """
    files = list_files(source)
    if split is not None:
        files = {name: load for name, load in files.items() if split in name.split("/")[:-1]}
    images = {name: load for name, load in files.items() if is_image_name(posixpath.basename(name))}
    if not images:
        raise InputError(f"{source} holds no images" + ("" if split is None else f" below a folder {split!r}"))
    ids = {name: number for number, name in enumerate(class_names)}
    read = _voc(source, files, images, ids) if annotations is None else _coco(Path(annotations), images, ids)
    found, marks = [], []
    for name, load in sorted(images.items()):
        if name not in read:
            continue
        data = load()
        image = open_image(name, data)
        boxes_n4, class_ids, segmentations, size = read[name]
        if size not in (None, (0, 0), image.size):  # some tools write zeros
            raise InputError(
                f"{name} has {image.width}×{image.height} pixels, and its annotations are for {size[0]:g}×{size[1]:g}"
            )
        if boxes_n4.size and not (
            (boxes_n4[:, :2] < boxes_n4[:, 2:]).all()
            and boxes_n4.min() >= -1
            and (boxes_n4[:, 2:] <= np.array(image.size) + 1).all()
        ):
            raise InputError(f"{name} has a box that is empty or leaves its {image.width}×{image.height} pixels")
        boxes_n4 = boxes_n4.astype(np.float32)
        outlines = _outlines(name, segmentations, image) if masks else None
        found.append(BoxedImage(posixpath.splitext(name)[0], load, boxes_n4, class_ids, outlines))
        marks.append([name, content_hash(data), boxes_n4.tolist(), class_ids.tolist()])
        if outlines is not None:
            marks[-1].append([each["counts"].decode() for each in outlines])
    if not any(len(image.class_ids) for image in found):
        raise InputError(f"the {len(found):,} images of {source} have no boxes")
    return BoxSet(tuple(found), tuple(class_names), sha256_bytes(canonical_json([marks, list(class_names)])))


# Boxes, ids and what a COCO file has as masks, of an image; its width and height where they are given.
_Objects = tuple[np.ndarray, np.ndarray, list, tuple[float, float] | None]
_Boxes = dict[str, _Objects]


def _arrays(
    size: tuple[float, float] | None,
    boxes: Sequence[Sequence[float]],
    ids: list[int],
    segmentations: Sequence[Any] = (),
) -> _Objects:
    return np.array(boxes, np.float64).reshape(-1, 4), np.array(ids, np.int64), list(segmentations), size


def _outlines(name: str, segmentations: list, image: Image.Image) -> tuple[RunLengths, ...]:
    try:
        return tuple(run_lengths(each, image.height, image.width) for each in segmentations)
    except ValueError as error:
        raise InputError(f"the masks of {name} cannot be used: {error}") from error


def _voc(source: object, files: dict, images: dict, ids: dict[str, int]) -> _Boxes:
    def stem(name: str) -> str:
        folders = {"images", "jpegimages", "annotations"}
        *path, base = posixpath.splitext(name)[0].split("/")
        return "/".join([*(each for each in path if each.lower() not in folders), base])

    by_stem = {stem(name): name for name in files if name.lower().endswith(".xml")}
    without = [name for name in images if stem(name) not in by_stem]
    if without:
        raise InputError(
            f"{len(without):,} of {len(images):,} images of {source} have no XML, for example {without[0]}"
        )
    return {name: _read_voc(by_stem[stem(name)], files[by_stem[stem(name)]](), ids) for name in images}


def _read_voc(name: str, data: bytes, ids: dict[str, int]) -> _Objects:
    boxes, class_ids = [], []
    try:
        size, found = read_voc(data)
        for box in found:
            if box.is_difficult:
                continue
            if box.class_name not in ids:
                raise ValueError(f"the class {box.class_name!r} is not among `classes`: {', '.join(ids)}")
            boxes.append(box.sides)
            class_ids.append(ids[box.class_name])
    except ValueError as error:
        raise InputError(f"the annotations {name} cannot be used: {error}") from error
    return _arrays(size, boxes, class_ids)


def _coco(path: Path, images: dict, ids: dict[str, int]) -> _Boxes:
    try:
        if path.stat().st_size > _JSON_BYTES:
            raise ValueError(f"it has more than {_JSON_BYTES:,} bytes")
        content = json.loads(path.read_bytes())
        listed = _by_id(content, "images", "file_name")
        classes = _by_id(content, "categories", "name")
        names = {number: each["file_name"] for number, each in listed.items()}
        found: dict[str, tuple[list, list, list]] = {name: ([], [], []) for name in names.values()}
        if len(found) < len(names):
            raise ValueError("it lists an image twice")
        for each in content["annotations"]:
            if each.get("iscrowd"):
                continue
            for part, known in (("image_id", names), ("category_id", classes)):
                if each[part] not in known:
                    raise ValueError(f"an annotation has the {part} {each[part]!r:.40}, which it does not list")
            if not isinstance(each["bbox"], list):
                raise ValueError(f"a bbox must be a list of four numbers, got {each['bbox']!r:.40}")
            left, top, width, height = map(float, each["bbox"])
            class_name = classes[each["category_id"]]["name"]
            if class_name not in ids:
                raise ValueError(f"the class {class_name!r} is not among `classes`: {', '.join(ids)}")
            boxes, class_ids, segmentations = found[names[each["image_id"]]]
            boxes.append([left, top, left + width, top + height])
            class_ids.append(ids[class_name])
            segmentations.append(each.get("segmentation"))
        sizes = {
            each["file_name"]: (float(each["width"]), float(each["height"]))
            for each in listed.values()
            if "width" in each and "height" in each
        }
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise InputError(f"the annotations {path} cannot be used as COCO's: {kind}{error}") from error
    # File names are relative to the folder of images, which may lie anywhere within the source.
    placed: _Boxes = {}
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
        placed[name] = _arrays(sizes.get(entry), *found[entry])
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
