"""mixup and cutmix: timm's distribution, and token targets that are exact to the covered share of each cell."""

import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.mixing import Mix, MixSettings, draw_mix, mix_class_targets, mix_images, mix_token_targets

MODES = ["batch", "pair", "elem"]


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_cutmix_pastes_the_partners_pixels_and_counts_them(mode, batch):
    images = torch.arange(batch).float()[:, None, None, None].expand(batch, 3, 24, 40).contiguous()
    for seed in range(10):
        mix = draw_mix(batch, 24, 40, MixSettings(cutmix=1.0, mode=mode), generator(seed))
        mixed = mix_images(images, mix)
        own = mixed == images
        share = own.float().mean(dim=(1, 2, 3))
        for sample in range(batch):
            if sample == batch - 1 - sample:
                continue
            assert torch.equal(mixed[sample].unique(), torch.tensor([sample, batch - 1 - sample]).float().unique()) or (
                share[sample] in (0.0, 1.0)
            )
            np.testing.assert_allclose(share[sample], mix.keep[sample], atol=1e-6)


def test_mixup_blends_as_timm_does():
    images = torch.rand(4, 3, 8, 8)
    mix = draw_mix(4, 8, 8, MixSettings(mixup=0.8), generator(3))
    lam = float(mix.keep[0])
    torch.testing.assert_close(mix_images(images, mix), images * lam + images.flip(0) * (1 - lam))
    targets = mix_class_targets(torch.tensor([0, 1, 2, 3]), 6, 0.1, mix)
    expected = timm.data.mixup.mixup_target(torch.tensor([0, 1, 2, 3]), 6, lam, 0.1)
    torch.testing.assert_close(targets, expected)


def test_lambda_follows_timms_distribution():
    ours = np.array([draw_mix(2, 64, 64, MixSettings(mixup=0.8), generator(seed)).keep[0] for seed in range(2000)])
    expected = np.random.Generator(np.random.Philox(99)).beta(0.8, 0.8, 2000)
    quantiles = np.linspace(0.1, 0.9, 9)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(expected, quantiles), atol=0.05)


def test_modes_share_or_part_their_draws():
    settings_ = MixSettings(mixup=0.8, cutmix=1.0, mode="pair")
    pair = draw_mix(7, 32, 32, settings_, generator(1))
    assert np.array_equal(pair.keep, pair.keep[::-1])
    assert len(set(pair.keep.tolist())) > 1
    batch = draw_mix(7, 32, 32, MixSettings(mixup=0.8, mode="batch"), generator(1))
    assert len(set(batch.keep.tolist())) == 1
    elem = draw_mix(7, 32, 32, MixSettings(mixup=0.8, mode="elem"), generator(1))
    assert len(set(elem.keep.tolist())) == 7


def test_prob_zero_mixes_nothing():
    images = torch.rand(3, 3, 8, 8)
    mix = draw_mix(3, 8, 8, MixSettings(mixup=0.8, cutmix=1.0, prob=1e-12), generator(1))
    torch.testing.assert_close(mix_images(images, mix), images)


@given(seed=st.integers(0, 10**6), h=st.integers(1, 9), w=st.integers(1, 9), mode=st.sampled_from(MODES))
@settings(deadline=None, max_examples=60)
def test_token_weights_are_the_share_of_the_pixels_in_each_cell(seed, h, w, mode):
    """The oracle: label maps painted at pixel resolution, mixed as pixels, then averaged over each cell."""
    cell = 6
    height, width = h * cell, w * cell
    mix = draw_mix(3, height, width, MixSettings(mixup=0.8, cutmix=1.0, mode=mode), generator(seed))
    classes = 3
    ids = torch.arange(3)[:, None, None].expand(3, h * w, 1)
    mixed_ids, mixed_weights = mix_token_targets(ids, torch.ones(3, h * w, 1), (h, w), mix)
    dense = torch.zeros(3, h * w, classes).scatter_add_(2, mixed_ids, mixed_weights)
    for sample in range(3):
        painted = torch.zeros(3, classes, height, width)
        painted[torch.arange(3), torch.arange(3)] = 1
        one = Mix(mix.keep, mix.boxes, mix.is_box, height, width)
        pixels = torch.stack([mix_images(painted[:, c : c + 1], one) for c in range(classes)], dim=1)[sample, :, 0]
        cells = torch.nn.functional.avg_pool2d(pixels, cell).reshape(classes, -1).T
        torch.testing.assert_close(dense[sample], cells, atol=1e-5, rtol=1e-5)
