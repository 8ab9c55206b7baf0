"""The outlines of the synthetic data set's classes, as signed distances.

Each takes coordinates x (right) and y (down) of equal shapes. The distance is negative inside and at most the true
distance outside. An outline fills roughly the square from −1 to 1.
"""

import math
from collections.abc import Callable
from functools import cache

import numpy as np

SQRT_HALF = math.sqrt(0.5)

Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1.0


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _polygon(x: np.ndarray, y: np.ndarray, corners: int, inner: float, turn: float) -> np.ndarray:
    """A regular polygon with a corner at the top and its sides at distance ``inner`` from the centre."""
    angle = np.arctan2(x, -y) + turn
    sector = 2 * math.pi / corners
    return np.hypot(x, y) * np.cos(np.mod(angle, sector) - sector / 2) - inner


def _arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    head = np.maximum((np.abs(x) - (y + 1.0)) * SQRT_HALF, y + 0.15)
    return np.minimum(head, _box(x, y - 0.35, 0.3, 0.6))


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(x, y), 0.84 - np.hypot(x - 0.52, y))


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_box(x, y, 0.34, 1.0), _box(x, y, 1.0, 0.34))


def _drop(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A disc and the cone from a tip above that touches it.
    radius, centre, tip = 0.66, 0.34, -1.15
    sine = radius / (centre - tip)
    cosine = math.sqrt(1 - sine**2)
    cone = np.maximum(np.abs(x) * cosine - (y - tip) * sine, y - (centre - radius * sine))
    return np.minimum(np.hypot(x, y - centre) - radius, cone)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Two discs, and the part of a square on its corner that lies below a notch between them.
    x, y = np.abs(x) * 1.1, (y + 0.12) * 1.1
    body = np.maximum((x + np.abs(y - 0.2) - 1.0) * SQRT_HALF, -0.8 * (y + 0.2) - 0.6 * x)
    return np.minimum(body, np.hypot(x - 0.56, y + 0.36) - 0.6) / 1.1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.76) - 0.24


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _box(x, y, 0.85, 0.85)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Five equal corners: in each fifth, folded in two, one straight side from the tip to the notch.
    fifth = 2 * math.pi / 5
    angle = np.abs(np.mod(np.arctan2(x, -y) + fifth / 2, fifth) - fifth / 2)
    radius = np.hypot(x, y)
    along, across = radius * np.cos(angle), radius * np.sin(angle)
    notch_along, notch_across = 0.46 * math.cos(fifth / 2), 0.46 * math.sin(fifth / 2)
    side = math.hypot(1.05 - notch_along, notch_across)
    return ((along - 1.05) * notch_across + across * (1.05 - notch_along)) / side


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _polygon(x, y - 0.15, 3, 0.55, 0.0)


OUTLINES: dict[str, Outline] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "drop": _drop,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}


@cache
def outline_moments(name: str) -> tuple[float, float, float]:
    """An outline's area, and the x and y of its centre of area, in its own units; measured on a fine grid."""
    axis = (np.arange(512) + 0.5) / 512 * 3.0 - 1.5
    x, y = np.meshgrid(axis, axis)
    inside = OUTLINES[name](x, y) < 0
    return float(inside.mean() * 9.0), float(x[inside].mean()), float(y[inside].mean())
