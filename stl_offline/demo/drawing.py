"""Drawing one image of the synthetic data set: a textured shape among clutter.

A class has an outline and a texture. Everything else is independent of the class: colours, area, position, rotation,
stretch, background, clutter and occlusion. Random numbers come from one generator per image, keyed by (seed, split,
number).

H, W: the image's sides, equal here; coordinates in pixels, y down. Colours are kept in planes (3, H, W) until the end,
which is several times faster in numpy.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from stl_offline.demo.outlines import OUTLINES, outline_moments
from stl_offline.random import drawing_generator

# The object's share of the image's area, before occlusion.
_AREA = (0.12, 0.26)
_LEAST_SEEN = 0.75
# Least distance between the mean colours of the object and its background, in 8-bit RGB.
_CONTRAST = 110.0
_TURN = math.pi / 6  # to either side; limited, because an arrow is recognised by its direction, too
_CLUTTER = (2, 6)
_SPREAD = 60
# Each class has its own texture, so that a part of an object is enough to recognise the class and a small model learns
# it in minutes. Kind, wavelength as a share of the image's side, angle.
_STRIPES, _CHECKS, _DOTS = range(3)
_TEXTURES = dict(
    zip(
        sorted(OUTLINES),
        [
            (_STRIPES, 0.09, 0.0),
            (_DOTS, 0.20, 0.0),
            (_CHECKS, 0.10, 0.0),
            (_STRIPES, 0.20, math.pi / 2),
            (_DOTS, 0.10, 0.0),
            (_STRIPES, 0.20, 0.0),
            (_CHECKS, 0.20, 0.0),
            (_STRIPES, 0.09, math.pi / 2),
            (_CHECKS, 0.14, math.pi / 4),
            (_DOTS, 0.14, math.pi / 4),
        ],
        strict=True,
    )
)


@dataclass(frozen=True)
class Drawing:
    """One image. pixels: (H, W, 3) uint8; mask: (H, W) bool, where the object is visible."""

    pixels: np.ndarray
    mask: np.ndarray


def draw_shape(name: str, seed: int, split: int, number: int, size: int) -> Drawing:
    """Draw an image of a class. The same arguments give the same image."""
    random = drawing_generator(seed, split, number)
    axis = np.arange(size, dtype=np.float32) + 0.5
    x, y = np.meshgrid(axis, axis)
    ground = random.uniform(25, 230, 3)
    canvas = _texture(random, x, y, size, ground, 40)
    for _ in range(random.integers(*_CLUTTER, endpoint=True)):
        patch = _texture(random, x, y, size, ground + random.uniform(-_SPREAD, _SPREAD, 3), 40)
        canvas = _over(canvas, patch, _coverage(_clutter(random, x, y, size)))

    distance = _object(random, name, x, y, size)
    coverage = _coverage(distance)
    mask = distance < 0
    canvas = _shadow(random, canvas, coverage, size)
    canvas = _over(canvas, _textured(random, x, y, size, _far_from(random, ground), name), coverage)

    if random.random() < 0.4:
        hidden = _clutter(random, x, y, size, 0.5)
        seen = mask & (hidden > 0)
        if seen.sum() >= _LEAST_SEEN * mask.sum():
            patch = _texture(random, x, y, size, ground + random.uniform(-_SPREAD, _SPREAD, 3), 40)
            canvas = _over(canvas, patch, _coverage(hidden))
            mask = seen
    return Drawing(_camera(random, canvas, x, y, size), mask)


def _object(random: np.random.Generator, name: str, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Signed distance, in pixels, of an outline of random area, position, rotation and stretch."""
    area, centre_x, centre_y = outline_moments(name)
    scale = math.sqrt(random.uniform(*_AREA) * size**2 / area)
    stretch = math.exp(random.uniform(-0.15, 0.15))
    turn = random.uniform(-_TURN, _TURN)
    # The centre of area has the same range for every class, though a star extends further than a disc: the position
    # must not depend on the class.
    left, top = random.uniform(0.38 * size, 0.62 * size, 2).tolist()
    # A slow warp of the plane makes each outline a little irregular.
    phase = random.uniform(0, 2 * math.pi, 2).tolist()
    wave = 2 * math.pi / (1.5 * scale)
    dx = x - left + 0.04 * scale * np.sin(wave * y + phase[0])
    dy = y - top + 0.04 * scale * np.sin(wave * x + phase[1])
    u, v = _turned(dx, dy, turn)
    return OUTLINES[name](u / (scale * stretch) + centre_x, v * (stretch / scale) + centre_y) * scale


def _clutter(random: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int, reach: float = 1.0) -> np.ndarray:
    """Signed distance, in pixels, of a blob of no class, a bar across the image, or a half-plane.

    reach: scales the blob; below 1 there is no half-plane.
    """
    left, top = random.uniform(0, size, 2).tolist()
    along, across = _turned(x - left, y - top, random.uniform(0, 2 * math.pi))
    kind = random.random()
    if kind < 0.3:
        return np.abs(along) - random.uniform(0.02, 0.07) * size
    if kind < 0.4 and reach == 1.0:
        return along
    border = 1.0
    theta = np.arctan2(across, along)
    for lobes in (2, 3, 5):
        border = border + random.uniform(0.1, 0.3) * np.sin(lobes * theta + random.uniform(0, 2 * math.pi))
    radius = np.hypot(along, across * random.uniform(1.0, 1.8))
    return radius - random.uniform(0.1, 0.28) * size * reach * border


def _texture(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int, colour: np.ndarray, depth: float
) -> np.ndarray:
    """(3, H, W) float: a colour and a similar one, mixed by clouds or a gradient.

    depth: largest difference of the two per channel, in 8-bit RGB.
    """
    first = colour.astype(np.float32).reshape(3, 1, 1)
    difference = random.uniform(-depth, depth, (3, 1, 1)).astype(np.float32)
    grain = _clouds(random, size, 16) * 20 - 10
    return first + grain + (_pattern(random, x, y, size) - 0.5) * (2 * difference)


def _far_from(random: np.random.Generator, colour: np.ndarray) -> np.ndarray:
    """A random colour that differs clearly from the given one."""
    for _ in range(100):
        drawn = random.uniform(20, 235, 3)
        if np.linalg.norm(drawn - colour) >= _CONTRAST:
            return drawn
    return 255.0 - colour


def _textured(
    random: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int, colour: np.ndarray, name: str
) -> np.ndarray:
    """(3, H, W) float: an object's colour and a lighter or darker one, in its class's texture."""
    kind, wavelength, angle = _TEXTURES[name]
    u, v = _turned(x, y, angle + random.uniform(-0.15, 0.15))
    wave = 2 * math.pi / (wavelength * random.uniform(0.9, 1.1) * size)
    phase = random.uniform(0, 2 * math.pi, 2).tolist()
    values = np.sin(u * wave + phase[0])
    if kind == _CHECKS:
        values = values * np.sin(v * wave + phase[1]) * 1.5
    elif kind == _DOTS:
        values = values + np.sin(v * wave + phase[1]) - 0.6
    depth = random.uniform(60, 110) * (-1 if colour.mean() > 127 else 1) * random.uniform(0.6, 1, 3)
    grain = _clouds(random, size, 16) * 20 - 10
    pattern = _unit(0.5 + random.uniform(1.0, 2.0) * values)
    return colour.astype(np.float32).reshape(3, 1, 1) + grain + pattern * depth.astype(np.float32).reshape(3, 1, 1)


def _pattern(random: np.random.Generator, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """(H, W) in [0, 1]: clouds or a gradient, which no class has as its texture."""
    if random.random() < 0.6:
        return _clouds(random, size, 4) * 0.6 + _clouds(random, size, 9) * 0.4
    u, _ = _turned(x, y, random.uniform(0, math.pi))
    return _unit(0.5 + 0.5 * u / size)


def _clouds(random: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """(H, W) in about [0, 1]: smooth noise with ``cells`` random values per side."""
    coarse = Image.fromarray(random.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _turned(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = math.cos(angle), math.sin(angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _coverage(distance: np.ndarray) -> np.ndarray:
    """(H, W) in [0, 1]: the covered share of each pixel, for an antialiased edge."""
    return _unit(0.5 - distance)


def _unit(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(values, 0.0), 1.0)


def _over(below: np.ndarray, above: np.ndarray, coverage: np.ndarray) -> np.ndarray:
    return below + (above - below) * coverage


def _shadow(random: np.random.Generator, canvas: np.ndarray, coverage: np.ndarray, size: int) -> np.ndarray:
    """A soft shadow beside the object."""
    shift = np.round(random.uniform(-0.05, 0.05, 2) * size).astype(int)
    sharp = Image.fromarray(np.roll(coverage, shift, (0, 1)))
    small = sharp.resize((max(1, size // 4),) * 2, Image.Resampling.BOX)
    soft = np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))
    return canvas * (1 - random.uniform(0.0, 0.5) * soft)


def _camera(random: np.random.Generator, canvas: np.ndarray, x: np.ndarray, y: np.ndarray, size: int) -> np.ndarray:
    """Add light from one side and noise, and convert to uint8 (H, W, 3)."""
    along, _ = _turned(x / size - 0.5, y / size - 0.5, random.uniform(0, 2 * math.pi))
    light = 1 + random.uniform(0, 0.35) * along
    noise = random.standard_normal(canvas.shape, dtype=np.float32) * random.uniform(2, 9)
    return np.ascontiguousarray(np.clip(canvas * light + noise, 0, 255).astype(np.uint8).transpose(1, 2, 0))
