"""mixup and cutmix: timm's distribution, and token targets that are exact to the covered share of each cell."""

import numpy as np
import pytest
import timm.data.mixup
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.augment import MixSettings, draw_mix, mix_class_targets, mix_images, mix_token_targets
from stl_offline.losses import token_cross_entropy

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_pixels_and_class_targets_are_timms_where_its_draws_are_ours(monkeypatch, mode, alphas):
    """timm's own Mixup, told to draw what we drew, on an even batch (it takes no other)."""
    batch, height, width = 6, 20, 33
    images, class_ids = torch.rand(batch, 3, height, width), torch.tensor([0, 3, 1, 2, 2, 5])
    settings_ = MixSettings(*alphas, prob=0.8, mode=mode)
    timms = timm.data.mixup.Mixup(*alphas, mode=mode, label_smoothing=0.1, num_classes=6)
    for seed in range(12):
        mix = draw_mix(batch, height, width, settings_, generator(seed))
        groups = {"batch": [0], "pair": [0, 1, 2], "elem": list(range(batch))}[mode]
        # Its λ before the box is cut only says whether to mix at all.
        lam = np.where(mix.is_box, 0.5, mix.keep)[groups]
        boxes = iter([(tuple(mix.boxes[group]), float(mix.keep[group])) for group in groups if mix.is_box[group]])
        monkeypatch.setattr(timm.data.mixup, "cutmix_bbox_and_lam", lambda *_, boxes=boxes, **__: next(boxes))
        if mode == "batch":
            monkeypatch.setattr(timms, "_params_per_batch", lambda lam=lam, mix=mix: (float(lam[0]), mix.is_box[0]))
        else:
            drawn = (lam.astype(np.float32), mix.is_box[groups])
            monkeypatch.setattr(timms, "_params_per_elem", lambda _, drawn=drawn: drawn)
        expected, targets = timms(images.clone(), class_ids)
        torch.testing.assert_close(mix_images(images, mix), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(mix_class_targets(class_ids, 6, 0.1, mix), targets, atol=1e-6, rtol=0)


def timms_mixes(mode, count, batch, height, width, monkeypatch):
    """What timm draws: (kept shares, boxes as (rows, columns, top, left)) of ``count`` batches."""
    timms = timm.data.mixup.Mixup(0.8, 1.0, prob=0.9, switch_prob=0.5, mode=mode, num_classes=2)
    monkeypatch.setattr(timm.data.mixup.np, "random", np.random.RandomState(8))
    keeps, boxes = [], []
    # Sample 0 says what is its own, its partner what came in.
    images = torch.zeros(batch, 1, height, width)
    images[0] = 1
    for _ in range(count):
        mixed, targets = timms(images.clone(), torch.tensor([1] + [0] * (batch - 1)))
        keeps.append(float((targets[0, 1] - 0.05) / 0.9))
        hole = mixed[0, 0] == 0
        if hole.any() and set(mixed[0].unique().tolist()) <= {0.0, 1.0}:
            rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
            boxes.append([len(rows), len(columns), rows[0], columns[0]])
    return np.array(keeps), np.array(boxes)


@pytest.mark.parametrize("mode", MODES)
def test_draws_follow_timms_distribution(mode, monkeypatch):
    batch, height, width, count = 2, 24, 40, 3000
    keeps, boxes = timms_mixes(mode, count, batch, height, width, monkeypatch)
    monkeypatch.undo()
    settings_ = MixSettings(0.8, 1.0, prob=0.9, mode=mode)
    mixes = [draw_mix(batch, height, width, settings_, generator(seed)) for seed in range(count)]
    ours = np.array([mix.keep[0] for mix in mixes])
    cut = np.array([mix.boxes[0] for mix in mixes if mix.is_box[0]])
    cut = np.stack([cut[:, 1] - cut[:, 0], cut[:, 3] - cut[:, 2], cut[:, 0], cut[:, 2]], axis=1)
    cut = cut[(cut[:, :2] > 0).all(axis=1)]
    quantiles = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, quantiles), np.quantile(keeps, quantiles), atol=0.06)
    assert abs((ours == 1).mean() - (keeps > 1 - 1e-6).mean()) < 0.03
    assert abs(len(cut) - len(boxes)) < 5 * np.sqrt(count / 4)
    for found, expected, side in zip(cut.T, boxes.T, (height, width) * 2, strict=True):
        np.testing.assert_allclose(np.quantile(found, quantiles), np.quantile(expected, quantiles), atol=0.08 * side)


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


@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    size=st.tuples(st.integers(7, 30), st.integers(7, 30)),
    mode=st.sampled_from(MODES),
)
@settings(deadline=None, max_examples=80)
def test_token_weights_are_the_share_of_the_pixels_in_each_cell(seed, batch, grid, size, mode):
    """The oracle: who owns each pixel after the mix, at a resolution that pixels and cells divide, averaged by cell.

    Pixels need not divide into cells: 30 pixels are 7 tokens in some models, too.
    """
    (h, w), (height, width) = grid, size
    mix = draw_mix(batch, height, width, MixSettings(mixup=0.8, cutmix=1.0, mode=mode), generator(seed))
    ids = torch.arange(batch)[:, None, None].expand(batch, h * w, 1)
    mixed_ids, mixed_weights = mix_token_targets(ids, torch.ones(batch, h * w, 1), grid, mix)
    found = torch.zeros(batch, h * w, batch).scatter_add_(2, mixed_ids, mixed_weights)
    owners = mix_images(torch.eye(batch)[:, :, None, None].expand(batch, batch, height, width), mix)
    fine = owners.repeat_interleave(h, dim=2).repeat_interleave(w, dim=3)
    expected = torch.nn.functional.avg_pool2d(fine, (height, width)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    own = found.mean(dim=1).diagonal()
    torch.testing.assert_close(own, _own_share(mix), atol=1e-5, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_residual_of_each_partner_is_outside_its_own_classes(smoothing):
    """The loss of mixed targets is that of the own and the partner's targets, each by its share."""
    grid, classes = (2, 3), 7
    mix = draw_mix(3, 12, 18, MixSettings(mixup=0.8, cutmix=1.0, mode="elem"), generator(2))
    random = torch.Generator().manual_seed(5)
    ids = torch.rand(3, 6, classes, generator=random).argsort(-1)[..., :3]
    ids[..., 2] = torch.where(torch.rand(3, 6, generator=random) < 0.7, -2, -1)
    weights = torch.rand(3, 6, 3, generator=random)
    logits = torch.randn(3, 6, classes, generator=random)
    # As training calls it. A row's own last id may be −1, behind which the partner's list begins nevertheless.
    mixed = token_cross_entropy(logits, *mix_token_targets(ids, weights, grid, mix), smoothing, ghosts=[2, 5])
    keep = mix_token_targets(ids, torch.ones_like(weights), grid, mix)[1][..., :1]
    total = mass = 0
    for part_ids, part_weights in ((ids, weights * keep), (ids.flip(0), weights.flip(0) * (1 - keep))):
        total += token_cross_entropy(logits, part_ids, part_weights, smoothing) * part_weights.sum()
        mass += part_weights.sum()
    torch.testing.assert_close(mixed, total / mass)


def _own_share(mix):
    """The class target's share of the own class; an image that is its own partner keeps all."""
    own = torch.from_numpy(mix.keep).clone()
    if len(own) % 2:
        own[len(own) // 2] = 1
    return own
