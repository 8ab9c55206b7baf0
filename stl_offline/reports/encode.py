"""Pixels for pages: an image under a view, and small images as data: URLs.

H, W: pixels; Gh, Gw: a token grid.
"""

import base64
import io

import numpy as np
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.geometry import View

JPEG_QUALITY = 82
# Axis-aligned boxes may overshoot an image by the rounding of float32.
_OVERSHOOT = 1e-3


def see_through(image: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """An image (H, W, 3) under a view, resized to ``size`` (height, width). Outside the image its border is repeated.

    Crops are resized with antialiasing; views that rotate, shear or leave the image take the nearest pixels.
    """
    height, width = image.shape[:2]
    try:
        left, top, box_width, box_height, flipped = view.box()
    except InputError:
        return _nearest(image, view, size)
    box = np.array([left * width, top * height, (left + box_width) * width, (top + box_height) * height])
    inside = np.clip(box, 0, [width, height, width, height])
    if np.abs(box - inside).max() > _OVERSHOOT:
        return _nearest(image, view, size)
    seen = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR, box=tuple(inside.tolist()))
    pixels = np.asarray(seen)
    return pixels[:, ::-1] if flipped else pixels


def shrink(image: np.ndarray, longest: int) -> np.ndarray:
    """An image (H, W, 3), resized if its longer side exceeds ``longest`` pixels."""
    height, width = image.shape[:2]
    factor = longest / max(height, width)
    if factor >= 1:
        return image
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


def jpeg_url(image: np.ndarray) -> str:
    """uint8 (H, W, 3) as a data: URL."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(stream, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return _url("image/jpeg", stream.getvalue())


def cells_url(cells: np.ndarray) -> str:
    """One pixel per token, uint8 (Gh, Gw, 3 or 4), as a data: URL. The page enlarges it without smoothing."""
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(cells)).save(stream, "PNG", optimize=True)
    return _url("image/png", stream.getvalue())


def _url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _nearest(image: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    rows, columns = ((np.arange(side) + 0.5) / side for side in size)
    source = view(np.stack(np.meshgrid(columns, rows), axis=-1))
    x = np.clip((source[..., 0] * width).astype(int), 0, width - 1)
    y = np.clip((source[..., 1] * height).astype(int), 0, height - 1)
    return image[y, x]
