"""Strong augmentation on the device, in batches, and what it means for token labels.

Every draw is a pure function of (seed, epoch, sample). What moves pixels is drawn as a view before loading
(`Augmentation.warps`), so that targets are made for it; the device then moves the pixels by that same view. Order:
RandAugment's colours, colour jitter, all moves in one resampling, erasing. Colours so see the whole crop, and no fill.

n: samples; B: batch; N: tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_offline.augment.colour import change_colours
from stl_offline.augment.erase import RandomErase, erase_boxes
from stl_offline.augment.jitter import color_jitter, draw_factors
from stl_offline.augment.mixing import (
    Mix,
    MixSettings,
    draw_mix,
    mix_class_targets,
    mix_images,
    mix_token_targets,
)
from stl_offline.augment.policy import RandAugment
from stl_offline.augment.warp import drawn_warps, visible_share, warp_images
from stl_offline.geometry import cells_in_boxes

__all__ = [
    "Augmentation",
    "Mix",
    "MixSettings",
    "RandAugment",
    "RandomErase",
    "draw_mix",
    "mix_class_targets",
    "mix_images",
    "mix_token_targets",
    "visible_share",
    "warp_images",
]

# Samples whose warps are drawn at a time: bounds the numbers held for millions of them.
_PART = 1 << 16


@dataclass(frozen=True)
class Augmentation:
    """What happens to pixels after loading.

    auto: RandAugment, or None; jitter: strength of colour jitter; erase: random erasing, or None; mean, std: of the
    images' normalisation; size: (H, W) in pixels; seed: of all draws.
    """

    auto: RandAugment | None
    jitter: float
    erase: RandomErase | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    seed: int

    def warps(self, epoch: int, samples: int) -> np.ndarray | None:
        """How pixels of samples 0 … n−1 move within their crops: views of it, float32 (n, 6); None: not at all."""
        if self.auto is None:
            return None
        warps = np.empty((samples, 6), dtype=np.float32)
        for start in range(0, samples, _PART):
            ids = np.arange(start, min(start + _PART, samples))
            warps[ids] = drawn_warps(self.auto.draw(self.seed, epoch, ids), self.size)
        return warps

    def __call__(
        self, images: Tensor, warps_B6: Tensor | None, epoch: int | np.ndarray, sample_ids: np.ndarray
    ) -> Tensor:
        """(B, 3, H, W) normalised → the same, augmented.

        warps_B6: the batch's rows of `warps`; epoch: whose draws are applied, one for all images or int64 (B,).
        """
        if self.auto is not None:
            images = change_colours(images, self.auto.draw(self.seed, epoch, sample_ids), self.mean, self.std)
        if self.jitter > 0:
            factors = torch.from_numpy(draw_factors(self.jitter, self.seed, epoch, sample_ids))
            images = color_jitter(images, factors, self.mean, self.std)
        if warps_B6 is not None:
            images = warp_images(images, warps_B6)
        if self.erase is not None:
            boxes = self.erase.draw(self.seed, epoch, sample_ids, self.size)
            images = erase_boxes(images, boxes, self.erase.mode, self.seed, epoch, sample_ids)
        return images

    def kept_share(self, epoch: int | np.ndarray, sample_ids: np.ndarray, grid: tuple[int, int]) -> Tensor | None:
        """The share of each token's cell that erasing leaves: float32 (B, N); None where nothing is ever erased."""
        if self.erase is None:
            return None
        boxes = self.erase.draw(self.seed, epoch, sample_ids, self.size)
        return torch.from_numpy(1 - cells_in_boxes(boxes, self.size, grid)).flatten(1)
