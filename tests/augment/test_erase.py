"""Random erasing against timm's: how often, how large, where; what fills it; and what it leaves of each token."""

import random

import numpy as np
import pytest
import torch
from timm.data import random_erasing

from stl_offline.augment import Augmentation, RandomErase
from stl_offline.augment.erase import erase_boxes
from stl_offline.errors import InputError

SIZE = (48, 80)


def statistics(boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Quantiles of what the erased boxes (m, 4) are like."""
    top, bottom, left, right = boxes.T.astype(np.float64)
    rows, columns = bottom - top, right - left
    values = {
        "area": rows * columns / (SIZE[0] * SIZE[1]),
        "ratio": np.log(rows / columns),
        "top": top / (SIZE[0] - rows),
        "left": left / (SIZE[1] - columns),
    }
    return {name: np.quantile(each, np.linspace(0.05, 0.95, 7)) for name, each in values.items()}


def test_boxes_follow_timms_distribution(monkeypatch):
    monkeypatch.setattr(random_erasing, "random", random.Random(3))
    timms = random_erasing.RandomErasing(0.7, mode="const", device="cpu")
    boxes = []
    for _ in range(4000):
        holes = timms(torch.ones(1, *SIZE))[0] == 0
        rows, columns = np.flatnonzero(holes.any(dim=1)), np.flatnonzero(holes.any(dim=0))
        boxes.append([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1] if len(rows) else [0, 0, 0, 0])
    expected = np.array(boxes)
    found = RandomErase(0.7).draw(1, 2, np.arange(20_000), SIZE)
    erased = [each[each[:, 1] > 0] for each in (found, expected)]
    np.testing.assert_allclose(len(erased[0]) / len(found), len(erased[1]) / len(expected), atol=0.03)
    for name, quantiles in statistics(erased[0]).items():
        np.testing.assert_allclose(quantiles, statistics(erased[1])[name], atol=0.1 if name == "ratio" else 0.04)


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_boxes_are_filled_as_timm_fills_them(mode):
    images = torch.full((40, 3, *SIZE), 7.0)
    ids = np.arange(100, 140)
    boxes = RandomErase(0.9).draw(1, 0, ids, SIZE)
    erased = erase_boxes(images, boxes, mode, 1, 0, ids)
    assert (images == 7).all()
    seen = []
    for image, (top, bottom, left, right) in zip(erased, boxes.tolist(), strict=True):
        inside = image[:, top:bottom, left:right]
        assert (image != 7).sum() == inside.numel()
        if inside.numel():
            seen.append(inside.flatten(1))
    values = torch.cat(seen, dim=1)
    if mode == "const":
        assert (values == 0).all()
    elif mode == "rand":
        assert all((each == each[:, :1]).all() for each in seen)
        assert len({float(each[channel, 0]) for each in seen for channel in range(3)}) == 3 * len(seen)
    else:
        np.testing.assert_allclose([values.mean(), values.std()], [0, 1], atol=0.02)


def test_noise_depends_on_the_sample_and_not_on_its_batch():
    ids = np.array([5, 9, 11])
    boxes = np.array([[0, 20, 3, 40]] * 3)
    images = torch.zeros(3, 3, *SIZE)
    whole = erase_boxes(images, boxes, "pixel", 4, 2, ids)
    assert torch.equal(erase_boxes(images[:1], boxes[:1], "pixel", 4, 2, ids[1:2])[0], whole[1])
    for seed, epoch, sample in ((5, 2, 9), (4, 3, 9), (4, 2, 10)):
        other = erase_boxes(images[:1], boxes[:1], "pixel", seed, epoch, np.array([sample]))
        assert abs(np.corrcoef(other.flatten(), whole[1].flatten())[0, 1]) < 0.5 or not torch.equal(other[0], whole[1])


@pytest.mark.parametrize("grid", [(6, 10), (7, 9), (1, 1)])
def test_a_tokens_share_is_what_the_pixels_leave(grid):
    """The oracle: the mask at a resolution that both pixels and cells divide, averaged over each cell."""
    augmentation = Augmentation(None, 0.0, RandomErase(0.8, "const"), (0.5,) * 3, (0.2,) * 3, SIZE, seed=6)
    ids = np.arange(12)
    images = augmentation(torch.ones(12, 3, *SIZE), None, 1, ids)
    mask = images[:, :1].repeat_interleave(grid[0], dim=2).repeat_interleave(grid[1], dim=3)
    expected = torch.nn.functional.avg_pool2d(mask, SIZE).flatten(1)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(augmentation.kept_share(1, ids, grid), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{"prob": 1.1}, {"prob": 0.5, "mode": "grey"}, {"prob": 0.5, "area": (0.5, 0.1)}])
def test_settings_that_cannot_be(settings):
    with pytest.raises(InputError):
        RandomErase(**settings)
