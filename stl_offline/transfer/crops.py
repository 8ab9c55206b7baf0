"""Random scaling, cropping and flipping of an image with its mask, as dense prediction trains: views and their pixels.

As everywhere, a view maps the output's unit coordinates to the image's. Here it may reach beyond the image: what lies
outside is filled with the mean colour and has no class.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from stl_offline.random import STREAM_DENSE, uniforms
from stl_offline.transfer.pairs import NO_CLASS


@dataclass(frozen=True)
class DenseCrops:
    """How crops are drawn.

    size: (H, W) of a crop; scale: range of the factor by which the image is scaled before; flip: probability of a
    horizontal flip.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5

    def draw(self, seed: int, epoch: int, sizes_n2: np.ndarray) -> np.ndarray:
        """Views of samples 0 … n−1 with (height, width) ``sizes_n2``: float64 (n, 6), by (seed, epoch, sample)."""
        numbers = uniforms(seed, STREAM_DENSE, epoch, np.arange(len(sizes_n2)), 4)
        low, high = self.scale
        factors = low + (high - low) * numbers[:, 0]
        # The crop in units of the image: (height, width) of each.
        shares = np.asarray(self.size) / (sizes_n2 * factors[:, None])
        # An image smaller than the crop lies at a random place within it.
        top, left = ((1 - shares) * numbers[:, 1:3]).T
        height, width = shares.T
        mirrored = numbers[:, 3] < self.flip
        zeros = np.zeros(len(sizes_n2))
        u0, du = np.where(mirrored, left + width, left), np.where(mirrored, -width, width)
        return np.stack([du, zeros, u0, zeros, height, top], axis=1)


def cut(
    image: Image.Image, mask: np.ndarray, view: np.ndarray, size: tuple[int, int], fill: tuple[int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask under a view from `DenseCrops.draw`.

    Bilinear with antialiasing for the image, nearest for the mask.

    Args:
        mask: int32 (H, W); view: (6,); size: (H, W) of the output; fill: the colour outside the image.

    Returns:
        uint8 (H, W, 3) and int32 (H, W), `NO_CLASS` outside the image.
    """
    du, _, u0, _, dv, v0 = view.tolist()
    mirrored = du < 0
    if mirrored:
        du, u0 = -du, u0 + du
    columns = _visible(u0, du, size[1])
    rows = _visible(v0, dv, size[0])
    pixels = np.empty((*size, 3), np.uint8)
    pixels[:] = fill
    ids = np.full(size, NO_CLASS, np.int32)
    if columns[0] < columns[1] and rows[0] < rows[1]:
        width, height = image.size
        left, right = ((u0 + du * column / size[1]) * width for column in columns)
        top, bottom = ((v0 + dv * row / size[0]) * height for row in rows)
        box = max(0.0, left), max(0.0, top), min(width, right), min(height, bottom)
        place = (slice(*rows), slice(*columns))
        inner = (columns[1] - columns[0], rows[1] - rows[0])
        pixels[place] = np.asarray(image.resize(inner, Image.Resampling.BILINEAR, box))
        ids[place] = np.asarray(Image.fromarray(mask).resize(inner, Image.Resampling.NEAREST, box))
    if mirrored:
        pixels, ids = pixels[:, ::-1], ids[:, ::-1]
    return np.ascontiguousarray(pixels), np.ascontiguousarray(ids)


def _visible(start: float, length: float, cells: int) -> tuple[int, int]:
    """The pixels [first, last) of a side of ``cells`` pixels whose centres lie within the image."""
    first = int(np.ceil((0.0 - start) / length * cells - 0.5))
    last = int(np.floor((1.0 - start) / length * cells - 0.5)) + 1
    return max(0, first), min(cells, last)
