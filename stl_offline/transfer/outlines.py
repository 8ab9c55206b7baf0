"""The masks of objects, as COCO has them: read from polygons or run lengths, kept as run lengths. And COCO's scores.

n: objects of an image; H, W: of the image.
"""

import importlib
import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from stl_offline.errors import MissingExtraError

# {"size": [H, W], "counts": bytes}: COCO's compressed run lengths, column by column.
RunLengths = dict[str, Any]
_MOST_POINTS = 1 << 16


def check_coco_can_run() -> None:
    """Raise `MissingExtraError` where pycocotools is not installed."""
    if importlib.util.find_spec("pycocotools") is None:
        raise MissingExtraError(
            "mAP and masks of objects need a package that is not installed: pip install 'stl-offline[detect]'"
        )


def run_lengths(segmentation: Any, height: int, width: int) -> RunLengths:
    """The mask of an object from what a COCO file has of it.

    Args:
        segmentation: polygons, each [x, y, x, y, …] in pixels; or run lengths, {"size": [H, W], "counts": …}, as a list
            of numbers or as COCO's string.
        height, width: of the image itself, in pixels.

    Raises:
        ValueError: it is neither, or leaves the image. pycocotools itself checks next to nothing: it reads beyond the
            mask's memory, or gives pixels that were never set.
    """
    mask = _pycocotools("mask")
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if size != [height, width]:
            raise ValueError(f"a mask has the size {size!r:.40} (height, width) in an image of {[height, width]}")
        counts = _parse(counts) if isinstance(counts, str) else counts
        if not isinstance(counts, list) or not all(type(each) is int and each >= 0 for each in counts):
            raise ValueError("the run lengths of a mask must be a string of COCO's, or a list of whole numbers")
        if sum(counts) != height * width:
            raise ValueError(f"the run lengths of a mask cover {sum(counts):,} of {height * width:,} pixels")
        return mask.frPyObjects({"size": size, "counts": counts}, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise ValueError("an object has no mask: its segmentation is neither polygons nor run lengths")
    for polygon in segmentation:
        _check_polygon(polygon, height, width)
    return mask.merge(mask.frPyObjects(segmentation, height, width))


def masks_of(found: Sequence[RunLengths], height: int, width: int) -> np.ndarray:
    """uint8 (n, H, W), 1 where the objects are."""
    masks_nHW = np.empty((len(found), height, width), np.uint8)
    for mask_HW, each in zip(masks_nHW, found, strict=True):
        counts = _parse(each["counts"].decode())
        mask_HW[:] = np.repeat(np.arange(len(counts)) % 2, counts).reshape(width, height).T
    return masks_nHW


def encode_masks(masks_nHW: np.ndarray) -> list[RunLengths]:
    """The inverse of `masks_of`."""
    return _pycocotools("mask").encode(np.asfortranarray(masks_nHW.transpose(1, 2, 0).astype(np.uint8)))


def coco_scores(dataset: dict[str, Any], detections: list[dict[str, Any]], kind: str) -> Any:
    """COCO's evaluation of detections, as its tools keep it.

    Args:
        dataset: the content of a COCO file; detections: annotations with scores.
        kind: what is compared, bbox or segm.
    """
    coco, evaluation = _pycocotools("coco"), _pycocotools("cocoeval")
    sets = []
    for annotations in (dataset["annotations"], detections):
        sets.append(coco.COCO())
        sets[-1].dataset = dataset | {"annotations": annotations}
        sets[-1].createIndex()
    measured = evaluation.COCOeval(*sets, kind)
    measured.evaluate()
    measured.accumulate()
    return measured


def _pycocotools(name: str) -> Any:
    return importlib.import_module(f"pycocotools.{name}")


def _check_polygon(polygon: Any, height: int, width: int) -> None:
    if not isinstance(polygon, list) or not 6 <= len(polygon) <= 2 * _MOST_POINTS or len(polygon) % 2:
        raise ValueError(f"a polygon must be a list of x, y, x, y, … of 3 to {_MOST_POINTS:,} points")
    if any(type(each) not in (int, float) or not math.isfinite(each) for each in polygon):
        raise ValueError("the coordinates of a polygon must be numbers")
    sides = (polygon[::2], width), (polygon[1::2], height)
    if any(min(values) < -1 or max(values) > side + 1 for values, side in sides):
        raise ValueError(f"a polygon leaves the {width}×{height} pixels of its image")


def _parse(text: str) -> list[int]:
    """The numbers in COCO's string: 5 bits a character, each number after the second as a difference."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(f"the run lengths {text!r:.40} of a mask are damaged")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    if shift:
        raise ValueError(f"the run lengths {text!r:.40} of a mask end within a number")
    return counts
