"""mixup and cutmix of a batch in memory: pixels, classes and token targets together.

B: batch; K: classes; N: tokens; T: targets per token.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from stl_offline.augment import MixSettings, draw_mix, mix_class_targets, mix_images, mix_token_targets
from stl_offline.loops.dataset import TokenBatch


class MixedBatch(NamedTuple):
    """images: (B, 3, H, W); class_targets: float32 (B, K), rows sum to 1; token_ids, token_weights: (B, N, T), or
    (B, N, 2T) where images were mixed."""

    images: Tensor
    class_targets: Tensor
    token_ids: Tensor
    token_weights: Tensor


def mix_batch(
    batch: TokenBatch,
    settings: MixSettings,
    generator: np.random.Generator,
    *,
    grid: tuple[int, int],
    num_classes: int,
    smoothing: float = 0.0,
) -> MixedBatch:
    """mixup or cutmix, with timm's distribution. Token targets are mixed by the share of each token's cell.

    Args:
        settings: alphas, probability and mode; with both alphas 0 classes are made targets and nothing is mixed.
        generator: what the mix is drawn from.
        grid: (h, w) of the tokens; num_classes: K; smoothing: label smoothing of the class targets.
    """
    images, ids, weights = batch.images, batch.token_ids, batch.token_weights
    mix = draw_mix(len(images), *images.shape[2:], settings, generator) if settings.enabled else None
    targets = mix_class_targets(batch.class_ids, num_classes, smoothing, mix)
    if mix is not None:
        images = mix_images(images, mix)
        ids, weights = mix_token_targets(ids, weights, grid, mix)
    return MixedBatch(images, targets, ids, weights)
