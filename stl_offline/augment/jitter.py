"""Colour jitter on the device, for a whole batch at once.

n: samples; B: batch. Images are (B, 3, H, W), normalised by mean and std.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stl_offline.device import upload
from stl_offline.errors import InputError
from stl_offline.random import STREAM_JITTER, uniforms

# Rec. 601 luma, as in torchvision's and PIL's conversion to grey.
_LUMA = (0.299, 0.587, 0.114)


def draw_factors(strength: float, seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray) -> np.ndarray:
    """Factors of brightness, contrast and saturation, each from U[max(0, 1−s), 1+s]: float32 (n, 3).

    epoch: one for all, or int64 (n,).

    Raises:
        InputError: a strength below zero.
    """
    if strength < 0:
        raise InputError(f"the strength of colour jitter must not be negative, got {strength}")
    low = max(0.0, 1 - strength)
    draws = uniforms(seed, STREAM_JITTER, epoch, sample_ids, 3)
    return (low + draws * (1 + strength - low)).astype(np.float32)


def color_jitter(images: Tensor, factors_B3: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Brightness, contrast and saturation, each by its own factor for each image (`draw_factors`).

    The three are linear, so they are one 3×3 matrix and a shift for each image: the arithmetic of torchvision's
    ColorJitter(s, s, s) in the order brightness, contrast, saturation, but clamped to the valid range once at the end.

    Args:
        images: (B, 3, H, W) float, normalised.
        factors_B3: float32, on any device; ones leave the images as they are.
    """
    brightness, contrast, saturation = upload(factors_B3, images.device).T
    scale, shift, luma = (upload(np.array(each, dtype=np.float32), images.device) for each in (std, mean, _LUMA))
    # p = scale·x + shift are the pixels in [0, 1]. Brightness and contrast: p → b·c·p + (1−c)·grey mean of b·p.
    means = images.float().mean(dim=(2, 3)) * scale + shift
    grey_mean = brightness * (means @ luma)
    gain = brightness * contrast
    offset = (1 - contrast) * grey_mean
    # Saturation mixes each pixel with its own grey: p → S p with S = s·I + (1−s)·1·lumaᵀ; a grey shift stays.
    mix = saturation[:, None, None] * torch.eye(3, device=images.device)
    mix = (mix + (1 - saturation)[:, None, None] * luma.expand(3, 3)) * gain[:, None, None]
    weight = mix * scale[None, None, :] / scale[None, :, None]
    bias = ((mix @ shift) + offset[:, None] - shift) / scale
    # Channels-last images are rows of three numbers already: one batched product, no copies.
    pixels = images.permute(0, 2, 3, 1).reshape(len(images), -1, 3)
    changed = torch.baddbmm(bias[:, None, :].to(images.dtype), pixels, weight.transpose(1, 2).to(images.dtype))
    lower = ((0 - shift) / scale).to(images.dtype)
    upper = ((1 - shift) / scale).to(images.dtype)
    changed = torch.clamp(changed, lower, upper)
    return changed.view(len(images), images.shape[2], images.shape[3], 3).permute(0, 3, 1, 2)
