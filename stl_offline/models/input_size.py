"""Whether a labeler sees its whole input, and which sizes near another one it does.

A label map is recorded with the view of the whole image. That is true only where the token grid covers all of it: a ViT
of 16-pixel patches drops the last 15 columns of a 239-pixel image, a ConvNeXt the last 31 of 255. Two checks find this
for any architecture: each outermost line of pixels must change some token, and the grid's cells must reach over
the whole image (where borders blur into the last cells, as in a ConvNeXt, the first check alone sees nothing).

Shape letters: B batch, Gh × Gw token grid, N = Gh·Gw, C features.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn

from stl_offline.errors import InputError

SIDES = ("top", "bottom", "left", "right")
# Sizes that are tried on either side of one that does not work.
_TRIES = 2
# A change counts above this share of the largest value, and above so many times the difference that equal images in one
# batch show.
_LEAST_CHANGE, _LEAST_CHANGE_DOUBLE, _TIMES_NOISE = 1e-6, 1e-12, 10


class InputSizeError(InputError):
    """A model cannot take images of some size, or does not see all of them."""


def unseen_sides(tokens: Callable[[torch.Tensor], torch.Tensor], image_1CHW: torch.Tensor) -> list[str]:
    """The sides of a (random) image whose outermost line of pixels changes no token.

    Args:
        tokens: normalised images (B, 3, height, width) → the tokens' features or logits (B, N, C).
    """
    images_6CHW = image_1CHW.repeat(6, 1, 1, 1)  # two equal ones, which show the noise of the arithmetic; four sides
    noise = 3 * image_1CHW[0].flip(1, 2)
    images_6CHW[2, :, 0] += noise[:, 0]
    images_6CHW[3, :, -1] += noise[:, -1]
    images_6CHW[4, :, :, 0] += noise[:, :, 0]
    images_6CHW[5, :, :, -1] += noise[:, :, -1]
    found = tokens(images_6CHW)
    share = _LEAST_CHANGE_DOUBLE if found.dtype == torch.float64 else _LEAST_CHANGE
    found = found.double()
    change = (found - found[:1]).abs().flatten(1).amax(dim=1)
    least = max(float(change[1]) * _TIMES_NOISE, float(found[0].abs().max()) * share)
    return [side for side, value in zip(SIDES, change[2:].tolist(), strict=True) if not value > least]


def cell_size(model: nn.Module) -> int | None:
    """Pixels from one cell of the last feature map to the next, as timm's models declare it; None where not."""
    try:
        return int(model.feature_info[-1]["reduction"])
    except (AttributeError, IndexError, KeyError, TypeError):
        return None


def uncovered(size: tuple[int, int], grid: tuple[int, int], cell: int | None) -> str:
    """How a grid of Gh × Gw cells falls short of images of ``size``; "" where it does not. ``cell``: `cell_size`."""
    if cell is None or (grid[0] * cell >= size[0] and grid[1] * cell >= size[1]):
        return ""
    covered = f"{min(size[0], grid[0] * cell)}×{min(size[1], grid[1] * cell)}"
    return f"its {grid[0]}×{grid[1]} tokens of {cell} pixels cover {covered}"


def with_open_branches(model: nn.Module) -> nn.Module:
    """A copy whose branches all count: scales that untrained models start with at (nearly) zero are one in it.

    While those are zero, pixels that only a residual branch reads change nothing.
    """
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.numel() == max(parameter.shape, default=1) and not name.endswith("bias")
            if is_scale and float(parameter.abs().max()) < 1e-3:
                parameter.fill_(1.0)
    return model


def nearest_sizes(works: Callable[[tuple[int, int]], bool], size: tuple[int, int], cell: int) -> list[tuple[int, int]]:
    """Sizes that work, nearest to ``size`` below and above it, found by trying multiples of ``cell``."""
    below = [tuple(max(1, side // cell - step) * cell for side in size) for step in range(_TRIES)]
    above = [tuple((side // cell + 1 + step) * cell for side in size) for step in range(_TRIES)]
    found = []
    for candidates in (below, above):
        hit = next((candidate for candidate in candidates if candidate not in found and works(candidate)), None)
        found += [] if hit is None else [hit]
    return found
