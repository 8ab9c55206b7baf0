"""mixup and cutmix that mix token targets as they mix pixels.

mixup (Zhang et al., arXiv 1710.09412) blends two images; cutmix (Yun et al., arXiv 1905.04899) pastes a box of one
into the other. timm's modes: "batch" draws one mix for the whole batch, "pair" one for each pair, "elem" one for each
image. Sample i mixes with sample B−1−i, so any batch size works (the middle one of an odd batch mixes with itself).

B: batch, K: classes, N: tokens on a grid (h, w), m: classes listed for a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_offline.device import upload
from stl_offline.geometry import cells_in_boxes, shares_in_boxes
from stl_offline.settings import MixSettings


@dataclass(frozen=True)
class Mix:
    """One batch's mix: sample i keeps ``keep[i]`` of its pixels' weight, the rest is its partner's.

    keep: (B,) float32; boxes: (B, 4) int64 of y0, y1, x0, x1 in pixels, empty for mixup; height and width in pixels.
    """

    keep: np.ndarray
    boxes: np.ndarray
    is_box: np.ndarray
    height: int
    width: int


def draw_mix(batch: int, height: int, width: int, settings: MixSettings, generator: np.random.Generator) -> Mix:
    """Draw how a batch is mixed, with timm's distribution (``timm.data.Mixup``)."""
    groups = {"batch": 1, "pair": (batch + 1) // 2, "elem": batch}[settings.mode]
    active = generator.random(groups) < settings.prob
    both = settings.mixup > 0 and settings.cutmix > 0
    is_box = generator.random(groups) < settings.switch if both else np.full(groups, settings.cutmix > 0)
    alphas = np.where(is_box, settings.cutmix, settings.mixup)
    keep = np.ones(groups)
    keep[active] = generator.beta(alphas[active], alphas[active])
    boxes = np.zeros((groups, 4), dtype=np.int64)
    cut = np.sqrt(1 - keep)
    for start, side in ((0, height), (2, width)):
        length = (side * cut).astype(np.int64)
        center = generator.integers(0, side, groups)
        boxes[:, start] = np.clip(center - length // 2, 0, side)
        boxes[:, start + 1] = np.clip(center + (length + 1) // 2, 0, side)
    boxes[~(is_box & active)] = 0
    # A box that meets the border covers less than was drawn: the pixels decide.
    covered = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / (height * width)
    keep = np.where(is_box, 1 - covered, keep).astype(np.float32)
    member = {
        "batch": np.zeros(batch, dtype=np.int64),
        "pair": np.minimum(np.arange(batch), np.arange(batch)[::-1]),
        "elem": np.arange(batch),
    }[settings.mode]
    return Mix(keep[member], boxes[member], (is_box & active)[member], height, width)


def mix_images(images: Tensor, mix: Mix) -> Tensor:
    """(B, 3, H, W) → the same, mixed."""
    keep = _pixel_keep(mix, images.device, images.dtype)
    return torch.lerp(images.flip(0), images, keep)


def mix_class_targets(
    class_ids: Tensor, classes: int, smoothing: float, mix: Mix | None, labels: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """(B,) int64 → (B, K) float32: smoothed one-hot targets, mixed by the share of pixels.

    labels: distributions (B, K), and the part (B, 1) of each target that they take in place of the image's own class.
    """
    targets = torch.full((len(class_ids), classes), smoothing / classes, device=class_ids.device)
    targets.scatter_add_(1, class_ids[:, None], torch.full_like(class_ids[:, None], 1 - smoothing, dtype=targets.dtype))
    if labels is not None:
        targets = torch.lerp(targets, *labels)
    if mix is None:
        return targets
    keep = upload(mix.keep, targets.device)[:, None]
    return torch.lerp(targets.flip(0), targets, keep)


def mix_token_targets(ids: Tensor, weights: Tensor, grid: tuple[int, int], mix: Mix) -> tuple[Tensor, Tensor]:
    """(B, N, m) ids and weights → (B, N, 2m): own labels and the partner's, by the share of each token's cell."""
    keep = _cell_keep(mix, grid, weights.device)[:, :, None]
    return (
        torch.cat([ids, ids.flip(0)], dim=2),
        torch.cat([weights * keep, weights.flip(0) * (1 - keep)], dim=2),
    )


def _pixel_keep(mix: Mix, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weight of the own pixel: (B, 1, H, W), or (B, 1, 1, 1) where no box is cut."""
    keep = upload(np.where(mix.is_box, np.float32(1), mix.keep).astype(np.float32), device, dtype)
    keep = keep[:, None, None, None]
    if not mix.is_box.any():
        return keep
    # Its two factors, multiplied on the device: the mask itself has as many bytes as a channel of the images.
    size = (mix.height, mix.width)
    down, across = (upload(share, device, dtype) for share in shares_in_boxes(mix.boxes, size, size))
    return keep * (1 - down[:, None, :, None] * across[:, None, None, :])


def _cell_keep(mix: Mix, grid: tuple[int, int], device: torch.device) -> Tensor:
    """Weight of the own label: (B, N), exact to the covered share of each cell."""
    inside = cells_in_boxes(mix.boxes, (mix.height, mix.width), grid).reshape(len(mix.keep), -1)
    keep = np.where(mix.is_box[:, None], 1 - inside, mix.keep[:, None])
    return upload(keep.astype(np.float32), device)
