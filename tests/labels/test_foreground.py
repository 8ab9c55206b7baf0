"""Label maps against masks: coverage of cells under views, ROC areas, calibration, and the command's figures."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import binary_auroc
from torchvision.ops import roi_align

from stl_offline.cli.main import main
from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.foreground import auroc, coverage, measure_foreground
from stl_offline.labels.label_set import open_label_set
from tests.labels.synthetic import make_key, make_spec, write_set

GRID = (3, 5)


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (0.25, 0.125, 0.5, 0.75), (0.4, 0.0, 0.6, 0.3)])
@pytest.mark.parametrize("flip", [False, True])
def test_coverage_is_that_of_roi_align(box, flip):
    mask = np.random.default_rng(0).random((24, 40)) < 0.4
    view = View.crop(*box)
    inside, outside = coverage(mask, view.flipped() if flip else view, GRID)
    left, top, width, height = box
    corners = torch.tensor([[0, left * 40, top * 24, (left + width) * 40, (top + height) * 24]]).float()
    # 8 points per cell and side, in an image enlarged without smoothing, as the mask is looked up without it.
    large = torch.from_numpy(mask).float().repeat_interleave(40, 0).repeat_interleave(40, 1)[None, None]
    expected = roi_align(large, corners * torch.tensor([1, 40, 40, 40, 40]), GRID, sampling_ratio=8, aligned=True)
    expected = expected[0, 0].numpy()
    np.testing.assert_allclose(inside, expected[:, ::-1] if flip else expected, atol=0.04)
    np.testing.assert_allclose(inside + outside, 1)


def test_coverage_is_exact_where_cells_hold_whole_pixels():
    mask = np.random.default_rng(1).random((12, 40)) < 0.5
    inside, _ = coverage(mask, View.identity(), GRID)
    np.testing.assert_array_equal(inside, mask.reshape(3, 4, 5, 8).mean((1, 3)))


def test_outside_of_the_image_is_neither():
    inside, outside = coverage(np.ones((4, 4), bool), View.crop(0.5, 0.0, 1.0, 1.0), (2, 2))
    np.testing.assert_array_equal(inside, [[1, 0], [1, 0]])
    np.testing.assert_array_equal(outside, np.zeros((2, 2)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_torchmetrics(cells):
    scores, inside = (np.array(column) for column in zip(*cells, strict=True))
    if inside.all() or not inside.any():
        return
    expected = binary_auroc(torch.from_numpy(scores / 5), torch.from_numpy(inside.astype(int)))
    assert auroc(scores, inside.astype(float), 1.0 - inside) == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture(scope="module", params=[1, 2])
def labels(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_set(path, make_spec(samples=11, classes=4, grid=GRID, top_k=3, view_count=request.param), 4)
    return open_label_set(path)


def test_against_a_count_by_hand(labels):
    draw = np.random.default_rng(2)
    masks = {make_key(place): draw.random((24, 40)) < 0.5 for place in range(9)}
    found = measure_foreground(labels, masks)
    assert (found.images, found.samples) == (9, 11)
    areas, tokens = [], []
    for key, mask in masks.items():
        label_map = labels[key]
        for view in range(labels.spec.views_per_image):
            inside, outside = coverage(mask, label_map.view(view), GRID)
            own = label_map.class_ids[view] == label_map.class_id
            mass = label_map.probabilities()[view]
            areas.append(auroc((mass * own).sum(-1).ravel(), inside.ravel(), outside.ravel()))
            tokens += [
                (float(mass[cell][0]), bool(own[cell][0]), inside[cell], outside[cell]) for cell in np.ndindex(GRID)
            ]
    best, first, inside, outside = (np.array(column) for column in zip(*tokens, strict=True))
    sure = first & (best >= 0.5)
    assert found.auroc == pytest.approx(np.mean(areas))
    assert found.confident_inside == pytest.approx(inside[sure].sum() / inside.sum())
    assert found.confident_outside == pytest.approx(outside[sure].sum() / outside.sum())
    assert found.contrast == pytest.approx(found.confident_inside / found.confident_outside)
    errors = 0
    for place in range(10):
        bin_ = np.minimum((best * 10).astype(int), 9) == place
        assert found.inside_by_confidence[place] == pytest.approx(inside[bin_].sum())
        if bin_.any():
            assert found.right_by_confidence[place] == pytest.approx(np.average(first[bin_], weights=inside[bin_]))
            errors += abs((inside[bin_] * (first[bin_] - best[bin_])).sum())
    assert found.calibration_error == pytest.approx(errors / inside.sum())


def test_the_command_prints_what_was_measured(tmp_path, capsys):
    write_set(tmp_path / "set", make_spec(samples=3), 1)
    masks = np.zeros((3, 12, 20), bool)
    masks[:, 4:8, :8] = True
    keys = json.dumps([make_key(place) for place in range(3)]).encode()
    np.savez(tmp_path / "masks.npz", keys=np.frombuffer(keys, np.uint8), masks=masks)
    assert main(["labels", "stats", str(tmp_path / "set"), "--masks", str(tmp_path / "masks.npz")]) == 0
    text = capsys.readouterr().out
    assert "3 of 3 images have one" in text and "AUROC" in text and "contrast" in text
    assert main(["labels", "stats", str(tmp_path / "set"), "--masks", str(tmp_path / "masks.npz"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["foreground"]
    assert found["images"] == 3 and 0 <= found["auroc"] <= 1


def test_masks_of_other_images(labels):
    with pytest.raises(InputError, match="none of the 11 images has a mask; keys look like 'folder 0/größe 00000.JPEG"):
        measure_foreground(labels, {"other": np.ones((2, 2), bool)})
