"""Colour jitter in one batch equals torchvision's, picture by picture."""

import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from stl_offline.augment import color_jitter

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(pixels):
    return TF.normalize(pixels, list(MEAN), list(STD)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [1, 5])
def test_equals_torchvision_where_nothing_is_clamped(batch):
    # Mid-grey pictures stay within [0, 1], so one clamp at the end and three in between are the same.
    pixels = torch.rand(batch, 3, 6, 10) * 0.2 + 0.4
    jittered = color_jitter(normalise(pixels), 0.2, MEAN, STD, torch.Generator().manual_seed(7))
    factors = torch.rand(3, batch, generator=torch.Generator().manual_seed(7)) * 0.4 + 0.8
    for sample in range(batch):
        brightness, contrast, saturation = factors[:, sample].tolist()
        expected = TF.adjust_brightness(pixels[sample], brightness)
        expected = TF.adjust_saturation(TF.adjust_contrast(expected, contrast), saturation)
        expected = normalise(expected[None])[0]
        torch.testing.assert_close(jittered[sample], expected, atol=2e-3, rtol=0)


def test_stays_within_the_valid_range_and_keeps_the_layout():
    pixels = torch.rand(4, 3, 8, 8).round()
    jittered = color_jitter(normalise(pixels), 0.9, MEAN, STD, torch.Generator().manual_seed(1))
    restored = jittered * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert restored.min() >= -1e-5
    assert restored.max() <= 1 + 1e-5
    assert jittered.is_contiguous(memory_format=torch.channels_last)


def test_strength_zero_is_the_picture_itself():
    images = torch.randn(2, 3, 4, 4)
    assert color_jitter(images, 0.0, MEAN, STD, torch.Generator()) is images
