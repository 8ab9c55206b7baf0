"""Random views: pure functions of what they are for, distributed as torchvision's RandomResizedCrop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings, View, center_views, draw_views, whole_views

COUNT = 3000


def boxes_of(views, height, width):
    """Views (n, 6) → pixel boxes (n, 4): left, top, width, height; and (n,) whether flipped."""
    flipped = views[:, 0] < 0
    left = np.where(flipped, views[:, 2] + views[:, 0], views[:, 2])
    boxes = np.stack([left, views[:, 5], abs(views[:, 0]), views[:, 4]], axis=1)
    return boxes * [width, height, width, height], flipped


def kolmogorov_smirnov(ours, theirs):
    """The largest distance between two samples' distribution functions."""
    both = np.sort(np.concatenate([ours, theirs]))
    return abs(
        np.searchsorted(np.sort(ours), both, "right") / len(ours)
        - np.searchsorted(np.sort(theirs), both, "right") / len(theirs)
    ).max()


@pytest.mark.parametrize(
    ("height", "width", "settings"),
    [
        (375, 500, CropSettings()),
        (64, 64, CropSettings(scale=(0.25, 1.0))),
        # Long images: most tries fail, and the fallback is common.
        (40, 300, CropSettings(scale=(0.3, 1.0))),
        (300, 40, CropSettings(scale=(0.6, 1.0), ratio=(0.5, 2.0))),
    ],
)
def test_boxes_follow_random_resized_crop(height, width, settings):
    ids = np.arange(COUNT)
    views = draw_views(3, 0, ids, np.full(COUNT, height), np.full(COUNT, width), settings)
    ours, flipped = boxes_of(views, height, width)
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [RandomResizedCrop.get_params(image, list(settings.scale), list(settings.ratio)) for _ in ids]
    theirs = np.array([(left, top, w, h) for top, left, h, w in drawn], dtype=float)
    # Two samples of one distribution are further apart than this once in a thousand; the seeds are fixed.
    threshold = 1.95 * np.sqrt(2 / COUNT)
    for what in (
        lambda boxes: boxes[:, 2] * boxes[:, 3],
        lambda boxes: boxes[:, 2] / boxes[:, 3],
        lambda boxes: boxes[:, 0],
        lambda boxes: boxes[:, 1],
        lambda boxes: boxes[:, 0] + boxes[:, 2],
    ):
        assert kolmogorov_smirnov(np.round(what(ours), 3), np.round(what(theirs), 3)) < threshold
    assert abs(flipped.mean() - 0.5) < 0.03


@given(
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**24 - 1),
    st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=20, unique=True),
    st.randoms(use_true_random=False),
)
def test_a_view_depends_on_seed_epoch_and_sample_alone(seed, epoch, ids, order):
    ids = np.array(ids)
    heights, widths = 50 + ids % 300, 40 + ids % 177
    together = draw_views(seed, epoch, ids, heights, widths, CropSettings())
    shuffled = list(range(len(ids)))
    order.shuffle(shuffled)
    subset = shuffled[: 1 + len(ids) // 2]
    apart = draw_views(seed, epoch, ids[subset], heights[subset], widths[subset], CropSettings())
    assert apart.tobytes() == together[subset].tobytes()


def test_epochs_seeds_and_samples_differ():
    sizes = np.full(50, 333), np.full(50, 500)
    first = draw_views(0, 0, np.arange(50), *sizes, CropSettings())
    assert len(np.unique(first, axis=0)) == 50
    for other in (
        draw_views(0, 1, np.arange(50), *sizes, CropSettings()),
        draw_views(1, 0, np.arange(50), *sizes, CropSettings()),
        draw_views(0, 0, np.arange(50) + 50, *sizes, CropSettings()),
    ):
        assert (first != other).any(axis=1).all()


def test_pinned_views():
    """Stored views and replays depend on these numbers: they must never change."""
    heights, widths = np.array([480, 64, 48]), np.array([640, 200, 48])
    views = draw_views(1, 2, np.array([0, 5, 2**33]), heights, widths, CropSettings())
    boxes = [boxes_of(views[i : i + 1], heights[i], widths[i])[0][0].round(3).tolist() for i in range(3)]
    assert boxes == [[99, 205, 304, 232], [49, 6, 62, 58], [3, 0, 45, 48]]
    assert not (views[:, 0] < 0).any()


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000), st.floats(0.01, 1), st.floats(0, 1))
def test_boxes_are_whole_pixels_of_the_image(height, width, sample, smallest, flip):
    settings = CropSettings(scale=(smallest, 1.0), flip=flip)
    views = draw_views(0, 0, np.array([sample]), np.array([height]), np.array([width]), settings)
    boxes, _ = boxes_of(views.astype(np.float64), height, width)
    left, top, box_width, box_height = np.round(boxes[0])
    np.testing.assert_allclose(boxes[0], [left, top, box_width, box_height], atol=1e-3)
    assert left >= 0 and top >= 0 and box_width >= 1 and box_height >= 1
    assert left + box_width <= width and top + box_height <= height
    View.from_array(views[0]).box()


def test_flip_chances():
    ids, sides = np.arange(2000), np.full(2000, 100)
    for flip in (0.0, 0.2, 1.0):
        views = draw_views(0, 0, ids, sides, sides, CropSettings(flip=flip))
        assert abs((views[:, 0] < 0).mean() - flip) < 0.03 * (0 < flip < 1) + 1e-9
    # The chance of a flip does not move the box.
    never = draw_views(0, 0, ids, sides, sides, CropSettings(flip=0.0))
    always = draw_views(0, 0, ids, sides, sides, CropSettings(flip=1.0))
    np.testing.assert_array_equal(boxes_of(never, 100, 100)[0].round(3), boxes_of(always, 100, 100)[0].round(3))


def test_fixed_views():
    assert whole_views(3).tolist() == [[1, 0, 0, 0, 1, 0]] * 3
    views = center_views(np.array([100, 300, 7]), np.array([200, 100, 7]), crop_pct=1.0)
    boxes = [View.from_array(view).box()[:4] for view in views]
    np.testing.assert_allclose(boxes, [(0.25, 0, 0.5, 1), (0, 1 / 3, 1, 1 / 3), (0, 0, 1, 1)], atol=1e-6)
    # Width over height is 2: the whole width of an image 100 wide, 50 of its 300 rows.
    wide = center_views(np.array([300]), np.array([100]), aspect=2.0)
    np.testing.assert_allclose(View.from_array(wide[0]).box()[:4], (0, 125 / 300, 1, 50 / 300), atol=1e-6)
    small = center_views(np.array([64]), np.array([64]), crop_pct=0.875)
    np.testing.assert_allclose(View.from_array(small[0]).box()[:4], (4 / 64, 4 / 64, 56 / 64, 56 / 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": (0, 1)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.1, 1.5)},
        {"ratio": (2, 1)},
        {"ratio": (0, 1)},
        {"flip": 2},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(InputError):
        CropSettings(**settings)


def test_impossible_center_crops_are_refused():
    with pytest.raises(InputError, match="`crop_pct` must lie in"):
        center_views(np.array([10]), np.array([10]), crop_pct=1.5)
