"""Pascal VOC's annotations of one image: its boxes, in one convention for all that read them."""

import math
import xml.etree.ElementTree as ElementTree
from typing import NamedTuple

MOST_BYTES = 1 << 20


class VocBox(NamedTuple):
    """An object's class and its box (left, top, right, bottom) in pixels from the image's upper left corner."""

    class_name: str
    is_difficult: bool
    sides: tuple[float, float, float, float]


def read_voc(data: bytes) -> tuple[tuple[float, float] | None, list[VocBox]]:
    """((width, height) in pixels or None where it is not given, boxes) of an XML file's content.

    VOC's corners are pixels that count from 1, both included.

    Raises:
        ValueError: too many bytes, no XML, or a box without numbers for its sides.
    """
    if len(data) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(str(error)) from error
    boxes = []
    for item in root.iterfind("object"):
        left, top, right, bottom = (_number(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        is_difficult = (item.findtext("difficult") or "0").strip() == "1"
        name = (item.findtext("name") or "").strip()
        boxes.append(VocBox(name, is_difficult, (left - 1, top - 1, right, bottom)))
    size = root.find("size")
    return (None if size is None else (_number(size, "width"), _number(size, "height"))), boxes


def _number(parent: ElementTree.Element, place: str) -> float:
    text = parent.findtext(place)
    try:
        value = float(text) if text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"<{place.replace('/', '><')}> must be a number, got {str(text)[:40]!r}")
    return value
