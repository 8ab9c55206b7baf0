"""RandAugment's operations that leave pixels where they are, for many images at once, each with its own argument.

On bytes, as timm's run on PIL images; the arithmetic is torchvision's wherever all images share it.

B: batch, H × W: image.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from stl_offline.augment.policy import MOVES, OPERATIONS, Operations
from stl_offline.device import upload

# An enhancement with factor f blends an image with one that lacks something: end + f · (image − end).
_ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Color": lambda pixels: TF.adjust_saturation(pixels, 0.0),
    "Contrast": lambda pixels: TF.adjust_contrast(pixels, 0.0),
    "Brightness": torch.zeros_like,
    "Sharpness": lambda pixels: _smooth(pixels),
}
_SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "AutoContrast": TF.autocontrast,
    "Equalize": TF.equalize,
    "Invert": TF.invert,
}


def change_colours(images: Tensor, operations: Operations, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply the operations that move nothing, in their order: (B, 3, H, W) normalised floats → the same."""
    moves = [OPERATIONS.index(name) for name in MOVES]
    colours = (operations.kinds >= 0) & ~np.isin(operations.kinds, moves)
    changed = np.flatnonzero(colours.any(axis=1))
    if len(changed) == 0:
        return images
    device = images.device
    on_device = upload(changed, device)
    scale, shift = (
        upload(np.array([255 * value for value in values], dtype=np.float32), device)[:, None, None]
        for values in (std, mean)
    )
    pixels = (images[on_device] * scale + shift).round().clamp(0, 255).to(torch.uint8).contiguous()
    kinds = np.where(colours, operations.kinds, -1)[changed]
    arguments = operations.arguments[changed].astype(np.float32)
    for layer in range(kinds.shape[1]):
        for kind in np.unique(kinds[:, layer]):
            if kind >= 0:
                places = np.flatnonzero(kinds[:, layer] == kind)
                given = upload(arguments[places, layer], device)
                rows = upload(places, device)
                pixels[rows] = change_colour(OPERATIONS[kind], pixels[rows], given)
    return images.index_copy(0, on_device, ((pixels - shift) / scale).to(images.dtype))


def change_colour(name: str, pixels: Tensor, arguments: Tensor) -> Tensor:
    """One kind of operation: uint8 (B, 3, H, W) and float arguments (B,) → uint8 (B, 3, H, W).

    Arguments: bits that stay (Posterize), the first byte that is inverted (Solarize), what is added below 128
    (SolarizeAdd), the factor (enhancements: 1 changes nothing), nothing (the others).
    """
    arguments = arguments[:, None, None, None]
    if name in _SHARED:
        return _SHARED[name](pixels)
    if name == "Posterize":
        step = 2 ** (8 - arguments.int())
        return (pixels.int() - pixels.int() % step).to(torch.uint8)
    if name == "Solarize":
        return torch.where(pixels < arguments, pixels, 255 - pixels)
    if name == "SolarizeAdd":
        return torch.where(pixels < 128, (pixels + arguments).clamp(max=255).to(torch.uint8), pixels)
    end = _ENDS[name](pixels).float()
    # PIL cuts fractions off.
    return (end + arguments * (pixels.float() - end)).clamp(0, 255).to(torch.uint8)


def _smooth(pixels: Tensor) -> Tensor:
    """PIL's filter SMOOTH, which leaves the border as it is: what torchvision's `adjust_sharpness` gives at factor 0.
    That one copies its kernel to the device, and waits for it."""
    result = pixels.clone()
    if min(pixels.shape[2:]) > 2:
        kernel = torch.full((pixels.shape[1], 1, 3, 3), 1 / 13, device=pixels.device)
        kernel[:, :, 1, 1].fill_(5 / 13)
        result[..., 1:-1, 1:-1] = F.conv2d(pixels.float(), kernel, groups=pixels.shape[1]).round_()
    return result
