"""Colour jitter in one batch equals torchvision's, image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from stl_offline.augment.jitter import color_jitter, draw_factors
from stl_offline.errors import InputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(pixels):
    return TF.normalize(pixels, list(MEAN), list(STD)).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("batch", [1, 5])
def test_equals_torchvision_where_nothing_is_clamped(batch):
    # Mid-grey images stay within [0, 1], so one clamp at the end and three in between are the same.
    pixels = torch.rand(batch, 3, 6, 10) * 0.2 + 0.4
    factors = torch.from_numpy(draw_factors(0.2, 7, 1, np.arange(batch)))
    jittered = color_jitter(normalise(pixels), factors, MEAN, STD)
    for sample in range(batch):
        brightness, contrast, saturation = factors[sample].tolist()
        expected = TF.adjust_brightness(pixels[sample], brightness)
        expected = TF.adjust_saturation(TF.adjust_contrast(expected, contrast), saturation)
        expected = normalise(expected[None])[0]
        torch.testing.assert_close(jittered[sample], expected, atol=2e-3, rtol=0)


def test_stays_within_the_valid_range_and_keeps_the_layout():
    pixels = torch.rand(4, 3, 8, 8).round()
    factors = torch.from_numpy(draw_factors(0.9, 1, 0, np.arange(4)))
    jittered = color_jitter(normalise(pixels), factors, MEAN, STD)
    restored = jittered * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    assert restored.min() >= -1e-5
    assert restored.max() <= 1 + 1e-5
    assert jittered.is_contiguous(memory_format=torch.channels_last)


def test_factors_are_even_and_functions_of_the_sample_alone():
    factors = draw_factors(0.4, 3, 2, np.arange(20_000))
    for values in factors.T:
        np.testing.assert_allclose(np.quantile(values, np.arange(5) / 4), 0.6 + 0.8 * np.arange(5) / 4, atol=0.02)
    np.testing.assert_array_equal(draw_factors(0.4, 3, 2, np.array([77, 5])), factors[[77, 5]])
    assert (draw_factors(0.4, 3, 3, np.array([77])) != factors[77]).all()
    assert draw_factors(1.5, 3, 2, np.arange(1000)).min() >= 0
    np.testing.assert_array_equal(draw_factors(0.0, 3, 2, np.arange(5)), np.ones((5, 3)))
    with pytest.raises(InputError, match="negative"):
        draw_factors(-0.1, 3, 2, np.arange(1))
