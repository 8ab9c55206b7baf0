"""RandAugment's operations that leave pixels where they are, for many images at once, each with its own argument.

On bytes, as timm's run on PIL images; the arithmetic is torchvision's wherever all images share it.

B: batch, H × W: image.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from stl_offline.augment.policy import MOVES, OPERATIONS, Operations

# An enhancement with factor f blends an image with one that lacks something: end + f · (image − end).
_ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "Color": lambda pixels: TF.adjust_saturation(pixels, 0.0),
    "Contrast": lambda pixels: TF.adjust_contrast(pixels, 0.0),
    "Brightness": torch.zeros_like,
    "Sharpness": lambda pixels: TF.adjust_sharpness(pixels, 0.0),
}
_SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "AutoContrast": TF.autocontrast,
    "Equalize": TF.equalize,
    "Invert": TF.invert,
}


def change_colours(images: Tensor, operations: Operations, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Apply the operations that move nothing, in their order: (B, 3, H, W) normalised floats → the same."""
    moves = [OPERATIONS.index(name) for name in MOVES]
    kinds = torch.from_numpy(operations.kinds)
    colours = (kinds >= 0) & ~torch.isin(kinds, torch.tensor(moves))
    changed = torch.nonzero(colours.any(dim=1))[:, 0]
    if len(changed) == 0:
        return images
    on_device = changed.to(images.device)
    scale, shift = (
        torch.tensor([255 * value for value in values], device=images.device)[:, None, None] for values in (std, mean)
    )
    pixels = (images[on_device] * scale + shift).round().clamp(0, 255).to(torch.uint8).contiguous()
    kinds = torch.where(colours, kinds, -1)[changed]
    arguments = torch.from_numpy(operations.arguments)[changed]
    for layer in range(kinds.shape[1]):
        for kind in kinds[:, layer].unique().tolist():
            if kind >= 0:
                rows = torch.nonzero(kinds[:, layer] == kind)[:, 0]
                given = arguments[rows, layer].float().to(images.device)
                rows = rows.to(images.device)
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
