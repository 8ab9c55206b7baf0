"""Random crops and flips of images in memory, each with the view that it shows.

B: images; H, W: of an image, in pixels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from stl_offline.config import INTERPOLATIONS
from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings, View, draw_views

# What Pillow's resize and torch's interpolate call ours.
_PILLOW = {"area": Image.Resampling.BOX, "bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_TORCH = {"area": "area", "bilinear": "bilinear", "bicubic": "bicubic"}


class RandomResizedCrop:
    """A random crop, resized to one size and flipped by chance, as torchvision's RandomResizedCrop and a flip.

    The crop is a pure function of (seed, epoch, sample): any process, in any order, makes the same one, and it is the
    one that `draw_views` gives for packed images.

    Args:
        size: side or (height, width) of the output, in pixels.
        settings: how crops are drawn.
        interpolation: "area", "bilinear" or "bicubic"; antialiased.
        seed: of the crops.

    Example:
        ::

            crop = RandomResizedCrop(224)
            pixels, view = crop(image, sample=17, epoch=3)  # what `image` is: a PIL image or a tensor
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        settings: CropSettings = CropSettings(),  # noqa: B008
        *,
        interpolation: str = "bilinear",
        seed: int = 0,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        if min(self.size) < 1:
            raise InputError(f"the size of crops must be positive, got {self.size}")
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {interpolation!r}")
        self.settings, self.interpolation, self.seed = settings, interpolation, seed

    def draw(self, height: int, width: int, sample: int, epoch: int) -> View:
        """The view of a sample in an epoch, for an image of height × width pixels."""
        one = (np.array([value]) for value in (sample, height, width))
        ids, heights, widths = one
        return View.from_array(draw_views(self.seed, epoch, ids, heights, widths, self.settings)[0])

    def __call__(self, image: Any, sample: int, epoch: int = 0, *, view: View | None = None) -> tuple[Any, View]:
        """The crop, and its view.

        Args:
            image: a PIL image, grey or RGB (of other modes Pillow resizes palettes and the like), or a tensor
                (..., H, W), uint8 or of floats.
            view: this one instead of a random one, such as a stored crop of a label set.

        Returns:
            pixels of the image's kind and type, (…, height, width); and the view.
        """
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        view = self.draw(height, width, sample, epoch) if view is None else view
        return self.show(image, view), view

    def show(self, image: Any, view: View) -> Any:
        """What an axis-aligned view shows of a PIL image or a tensor; its edges are rounded to whole pixels."""
        height, width = image.shape[-2:] if isinstance(image, Tensor) else image.size[::-1]
        left, top, crop_width, crop_height, flipped = view.box()
        x0, x1 = (min(max(round(edge * width), 0), width) for edge in (left, left + crop_width))
        y0, y1 = (min(max(round(edge * height), 0), height) for edge in (top, top + crop_height))
        if x0 >= x1 or y0 >= y1:
            raise InputError(f"{view} shows no pixel of an image of {height}×{width} pixels")
        if isinstance(image, Tensor):
            pixels = _resize(image[..., y0:y1, x0:x1], self.size, _TORCH[self.interpolation])
            return pixels.flip(-1) if flipped else pixels
        pixels = image.crop((x0, y0, x1, y1)).resize(self.size[::-1], _PILLOW[self.interpolation])
        return pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else pixels


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """(..., H, W) → (..., height, width), of the same type."""
    flat = image.reshape(1, -1, *image.shape[-2:])
    floats = flat if flat.is_floating_point() else flat.float()
    smooth = {} if mode == "area" else {"antialias": True, "align_corners": False}
    pixels = F.interpolate(floats, size, mode=mode, **smooth)
    if not flat.is_floating_point():
        pixels = pixels.round_().clamp_(0, torch.iinfo(image.dtype).max).to(image.dtype)
    return pixels.reshape(*image.shape[:-2], *size)
