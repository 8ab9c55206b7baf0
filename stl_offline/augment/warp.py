"""What moves pixels: the matrices of RandAugment's moves, and the one resampling that applies them.

All moves of an image are one view A of its crop (`stl_offline.geometry`): output (u, v) shows the crop at A(u, v). The
same A is the last factor of the student's view, so labels move by the very numbers that pixels move by.

n: samples; B: batch; H, W: image; h, w: tokens, N = h·w.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stl_offline.augment.policy import MOVES, OPERATIONS, Operations
from stl_offline.device import upload
from stl_offline.geometry import compose_views

_IDENTITY = np.array([1, 0, 0, 0, 1, 0], dtype=np.float64)
# Pixel centres this far outside (in halves of the image) are on its edge: warps are float32.
_EDGE = 1e-5


def move_views(name: str, arguments: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """One kind of move as views of the crop, with PIL's signs and centres: arguments (n,) → float64 (n, 6).

    Rotation is by degrees, anticlockwise, around the centre; shears are per pixel, from the upper left corner;
    translations are shares of the side, and positive ones show what lies to the right or below. ``size``: (H, W).
    """
    views = np.tile(_IDENTITY, (len(arguments), 1))
    down_by_across = size[0] / size[1]
    if name == "Rotate":
        cos, sin = np.cos(np.radians(arguments)), np.sin(np.radians(arguments))
        views[:, 0], views[:, 1] = cos, -sin * down_by_across
        views[:, 3], views[:, 4] = sin / down_by_across, cos
        views[:, 2] = 0.5 - 0.5 * (views[:, 0] + views[:, 1])
        views[:, 5] = 0.5 - 0.5 * (views[:, 3] + views[:, 4])
    elif name == "ShearX":
        views[:, 1] = arguments * down_by_across
    elif name == "ShearY":
        views[:, 3] = arguments / down_by_across
    elif name == "TranslateXRel":
        views[:, 2] = arguments
    else:
        views[:, 5] = arguments
    return views


def drawn_warps(operations: Operations, size: tuple[int, int]) -> np.ndarray:
    """All moves of each sample as one view of its crop, float32 (n, 6); the identity where nothing moves.

    A later operation moves what an earlier one made, so the first one's view is the outer factor.
    """
    warps = np.tile(_IDENTITY.astype(np.float32), (len(operations.kinds), 1))
    for layer in range(operations.kinds.shape[1]):
        kinds, arguments = operations.kinds[:, layer], operations.arguments[:, layer]
        for name in MOVES:
            moved = np.flatnonzero(kinds == OPERATIONS.index(name))
            warps[moved] = compose_views(warps[moved], move_views(name, arguments[moved], size))
    return warps


def warp_images(images: Tensor, warps_B6: Tensor, fill: float = 0.0) -> Tensor:
    """Move pixels: (B, C, H, W) → the same; output (u, v) is the bilinear sample at warp(u, v).

    Args:
        images: floats, any memory layout, which is kept.
        warps_B6: float32; on the CPU, or a GPU is waited for.
        fill: what stands where a pixel's centre comes from outside: 0 is the mean colour of normalised images.
    """
    warps = warps_B6.cpu().numpy()
    places = np.flatnonzero((warps != _IDENTITY.astype(np.float32)).any(axis=1))
    if len(places) == 0:
        return images
    a, b, u, c, d, v = warps[places].astype(np.float64).T
    # From [0, 1] to torch's coordinates in [−1, 1].
    rows = np.array([[a, b, a + b + 2 * u - 1], [c, d, c + d + 2 * v - 1]], dtype=np.float32)
    matrices = upload(np.ascontiguousarray(rows.transpose(2, 0, 1)), images.device)
    moved = upload(places, images.device)
    part = images[moved]
    points = F.affine_grid(matrices, list(part.shape), align_corners=False)
    result = F.grid_sample(part, points.to(part.dtype), padding_mode="border", align_corners=False)
    outside = (points.abs() > 1 + _EDGE).any(dim=-1)[:, None]
    return images.index_copy(0, moved, result.masked_fill(outside, fill))


def visible_share(warps_B6: Tensor, grid: tuple[int, int], sampling_ratio: int) -> Tensor:
    """The share of each token's s × s sample points that a warp takes from within the crop: float32 (B, N)."""
    (h, w), s = grid, sampling_ratio
    v = (torch.arange(h * s, dtype=torch.float64) + 0.5) / (h * s)
    u = (torch.arange(w * s, dtype=torch.float64) + 0.5) / (w * s)
    points = torch.stack(torch.broadcast_tensors(u[None, :], v[:, None], torch.ones(()).double()), dim=-1)
    at = torch.einsum("yxk,bjk->bjyx", points, warps_B6.double().view(-1, 2, 3))
    inside = ((at >= -_EDGE) & (at <= 1 + _EDGE)).all(dim=1).float()
    return F.avg_pool2d(inside, s).flatten(1)
