"""Colours and letters of classes, the same in every image, on every page and in every log.

The first ten class colours and the grey of "no label" were searched for together: under Machado's simulations of
full protanopia, deuteranopia and tritanopia ("A Physiologically-based Model for Simulation of Color Vision
Deficiency", IEEE TVCG 2009) any two stay apart. No list can do that for a thousand classes, so classes also have
letters. Needs numpy alone: training draws with these colours where no plotting package is installed.
"""

import colorsys
import string
from collections.abc import Mapping

import numpy as np

Color = tuple[float, float, float]  # red, green, blue in [0, 1]


def rgb(text: str) -> Color:
    """``#rrggbb`` as a colour."""
    red, green, blue = bytes.fromhex(text.removeprefix("#"))
    return red / 255, green / 255, blue / 255


def hex_color(color: Color) -> str:
    """A colour as ``#rrggbb``."""
    return "#" + bytes(round(255 * part) for part in color).hex()


UNLABELLED: Color = (0.62, 0.62, 0.62)
# Tokens that predict the image's own class, at or above the confidence threshold and below it.
CONFIDENT: Color = rgb("#0b5fa5")
UNCONFIDENT: Color = rgb("#e69f00")
FIRST_COLORS = (
    "#f23e19",  # red
    "#5e4ada",  # indigo
    "#029451",  # green
    "#ffe918",  # yellow
    "#ab0794",  # magenta
    "#b8d5f7",  # pale blue
    "#694936",  # brown
    "#39ffb6",  # mint
    "#e186fc",  # orchid
    "#6ec916",  # lime
)
GOLDEN = 0.6180339887498949
LETTERS = string.ascii_uppercase + string.ascii_lowercase


def class_color(class_id: int) -> Color:
    """The colour of a class. It depends on the id alone; negative ids have no label and are grey."""
    if class_id < 0:
        return UNLABELLED
    if class_id < len(FIRST_COLORS):
        return rgb(FIRST_COLORS[class_id])
    # Steps of the golden ratio around the hue circle keep neighbours apart; three shades separate similar hues.
    saturation, value = ((0.85, 0.95), (0.6, 0.7), (0.45, 1.0))[class_id % 3]
    return colorsys.hsv_to_rgb(class_id * GOLDEN % 1.0, saturation, value)


def class_pixels(class_ids: np.ndarray) -> np.ndarray:
    """Class ids of any shape (…) → uint8 (…, 3)."""
    unique, places = np.unique(class_ids, return_inverse=True)
    table = np.array([class_color(int(class_id)) for class_id in unique])
    return np.round(table * 255).astype(np.uint8)[places.reshape(class_ids.shape)]


def ink_on(color: Color) -> str:
    """Black or white, whichever has more contrast with a colour (relative luminance of WCAG 2.2)."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 1.05 * 0.05 else "#ffffff"


def class_marks(tokens: Mapping[int, int]) -> dict[int, str]:
    """A letter per class: class id → number of its tokens, into class id → letter.

    The classes with most tokens get the 52 letters, in the order of their ids; the rest have none.
    """
    known = [class_id for class_id in tokens if class_id >= 0]
    ranked = sorted(known, key=lambda class_id: (-tokens[class_id], class_id))[: len(LETTERS)]
    return dict(zip(sorted(ranked), LETTERS, strict=False))
