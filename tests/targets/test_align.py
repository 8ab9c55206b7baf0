"""RoIAlign on sparse labels against torchvision's on dense ones, and what must hold beyond its reach.

K: classes; Gh, Gw: the map's grid; h, w: the output's.
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import roi_align

from stl_offline.errors import InputError
from stl_offline.geometry import WHOLE_MAP, View, relative_view
from stl_offline.targets.align import roi_align_topk, roi_align_topk_into

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


@st.composite
def boxes(draw):
    """(left, top, width, height) within the map, in general with x ≠ y."""
    width, height = draw(st.floats(0.05, 1)), draw(st.floats(0.05, 1))
    return draw(st.floats(0, 1 - width)), draw(st.floats(0, 1 - height)), width, height


def make_map(seed, grid, k, classes, dtype=np.uint16):
    """Random sparse labels (Gh, Gw, k), best first, that leave a residual."""
    draw = np.random.default_rng(seed)
    ids = np.argsort(draw.random((*grid, classes)), axis=-1)[..., :k].astype(dtype)
    shares = draw.dirichlet(np.ones(k + 1), size=grid)[..., :k]
    return ids, -np.sort(-shares, axis=-1).astype(np.float32)


def to_dense(ids, probabilities, classes):
    """(…, k) → (K, …)."""
    full = np.zeros((*ids.shape[:-1], classes + 1), dtype=np.float32)
    np.put_along_axis(full, np.where(ids < 0, classes, ids).astype(np.int64), probabilities, axis=-1)
    return np.moveaxis(full[..., :classes], -1, 0)


def torchvision_align(dense, box, out_grid, sampling_ratio):
    """The oracle: dense (K, Gh, Gw) → (K, h, w)."""
    rows, columns = dense.shape[1:]
    left, top, width, height = box
    corners = [[left * columns, top * rows, (left + width) * columns, (top + height) * rows]]
    return roi_align(
        torch.from_numpy(dense.copy())[None],
        [torch.tensor(corners, dtype=torch.float32)],
        out_grid,
        spatial_scale=1.0,
        sampling_ratio=sampling_ratio,
        aligned=True,
    )[0].numpy()


def by_hand(dense, matrix, out_grid, s):
    """A slow second opinion that knows the map's edge and any matrix: dense (K, Gh, Gw) → (K, h, w), covered."""
    classes, rows, columns = dense.shape
    sums, covered = np.zeros((classes, *out_grid)), np.zeros(out_grid)
    for r, c in np.ndindex(*out_grid):
        for i, j in np.ndindex(s, s):
            point = np.array([(c + (j + 0.5) / s) / out_grid[1], (r + (i + 0.5) / s) / out_grid[0], 1])
            x, y = matrix.astype(np.float64) @ point
            if not (-1e-6 <= x <= 1 + 1e-6 and -1e-6 <= y <= 1 + 1e-6):
                continue
            covered[r, c] += 1 / s**2
            px, py = np.clip(x * columns - 0.5, 0, columns - 1), np.clip(y * rows - 0.5, 0, rows - 1)
            for row, column in np.ndindex(rows, columns):
                weight = max(0, 1 - abs(py - row)) * max(0, 1 - abs(px - column))
                sums[:, r, c] += weight * dense[:, row, column] / s**2
    return sums, covered


@given(seeds, grids, grids, st.integers(1, 4), boxes(), st.sampled_from([np.uint16, np.uint32, np.int64]))
def test_equals_torchvision_on_dense_probabilities(seed, grid, out_grid, s, box, dtype):
    classes, k = 11, 4
    ids, probabilities = make_map(seed, grid, k, classes, dtype)
    found_ids, found, covered = roi_align_topk(ids, probabilities, View.crop(*box).matrix, out_grid, s, classes)
    assert (found_ids.dtype, found.dtype, covered.dtype) == (np.int32, np.float32, np.float32)
    if grid == out_grid and box == (0, 0, 1, 1):
        return  # The identity: see below; torchvision still averages neighbours.
    expected = torchvision_align(to_dense(ids, probabilities, classes), box, out_grid, s)
    np.testing.assert_allclose(to_dense(found_ids, found, classes), expected, atol=3e-5)
    np.testing.assert_allclose(covered, 1)


@given(seeds, grids, grids, st.integers(1, 3), boxes())
def test_a_flip_equals_flipping_the_dense_map(seed, grid, out_grid, s, box):
    classes = 9
    ids, probabilities = make_map(seed, grid, 3, classes)
    found_ids, found, _ = roi_align_topk(ids, probabilities, View.crop(*box).flipped().matrix, out_grid, s, classes)
    left, top, width, height = box
    mirrored = to_dense(ids, probabilities, classes)[..., ::-1]
    expected = torchvision_align(mirrored, (1 - left - width, top, width, height), out_grid, s)
    np.testing.assert_allclose(to_dense(found_ids, found, classes), expected, atol=3e-5)


@given(seeds, grids, st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_the_identity_gives_the_stored_bits(seed, grid, k, m, s):
    ids, probabilities = make_map(seed, grid, k, 6)
    view = View.crop(0.1, 0.3, 0.37, 0.61).flipped()
    relative = relative_view(view, View.from_array(view.matrix.ravel()))
    found_ids, found, covered = roi_align_topk(ids, probabilities, relative, grid, s, m)
    kept = min(k, m)
    assert (found_ids[..., :kept] == ids[..., :kept]).all()
    assert found[..., :kept].tobytes() == probabilities[..., :kept].tobytes()
    assert (found_ids[..., kept:] == -1).all() and (found[..., kept:] == 0).all()
    assert (covered == 1).all()


def test_the_identity_keeps_the_stored_order_of_ties():
    ids = np.array([[[5, 2, 9]]], dtype=np.uint16)
    probabilities = np.array([[[0.25, 0.25, 0.0]]], dtype=np.float32)
    found_ids, found, _ = roi_align_topk(ids, probabilities, np.eye(2, 3), (1, 1), 2, 4)
    assert found_ids.tolist() == [[[5, 2, 9, -1]]]
    assert found.tolist() == [[[0.25, 0.25, 0, 0]]]


def test_nearly_the_identity_is_the_identity_and_hardly_more_is_not():
    ids, probabilities = make_map(0, (4, 6), 3, 50)
    near = np.eye(2, 3) + 0.9e-6
    assert roi_align_topk(ids, probabilities, near, (4, 6), 2, 3)[1].tobytes() == probabilities.tobytes()
    far = np.eye(2, 3) * (1 - 1e-4)
    assert roi_align_topk(ids, probabilities, far, (4, 6), 2, 3)[1].tobytes() != probabilities.tobytes()
    # Another grid under the same view is averaged, not copied.
    assert (roi_align_topk(ids, probabilities, np.eye(2, 3), (6, 4), 2, 12)[1][..., 3:] > 0).any()


def test_half_covered_cells():
    ids = np.zeros((2, 2, 1), dtype=np.uint16)
    ids[:, 1] = 1
    probabilities = np.full((2, 2, 1), 0.5, dtype=np.float32)
    # As large as the map, a quarter of it further right: the first column of four lies whole on the map's second …
    found_ids, found, covered = roi_align_topk(ids, probabilities, View.crop(0.75, 0, 1, 1).matrix, (1, 4), 2, 2)
    np.testing.assert_array_equal(covered, [[1, 0, 0, 0]])
    assert found_ids[0, :, 0].tolist() == [1, -1, -1, -1]
    np.testing.assert_array_equal(found[0, :, 0], [0.5, 0, 0, 0])
    # … and one of two columns lies half on it, whose probability is half of the map's.
    found_ids, found, covered = roi_align_topk(ids, probabilities, View.crop(0.75, 0, 1, 1).matrix, (1, 2), 2, 2)
    np.testing.assert_array_equal(covered, [[0.5, 0]])
    np.testing.assert_array_equal(found[0, 0], [0.25, 0])
    assert (found_ids[0, 0, 0], found_ids[0, 1, 0]) == (1, -1)
    # A quarter of the corner's cell is on the map.
    covered = roi_align_topk(ids, probabilities, View.crop(-0.25, -0.25, 1, 1).matrix, (2, 2), 2, 2)[2]
    np.testing.assert_array_equal(covered, [[0.25, 0.5], [0.5, 1]])


@given(seeds, grids, grids, st.integers(1, 3), st.lists(st.floats(-1.5, 1.5), min_size=6, max_size=6))
def test_any_matrix_against_the_second_opinion(seed, grid, out_grid, s, numbers):
    matrix = np.array(numbers, dtype=np.float32).reshape(2, 3)
    classes = 8
    ids, probabilities = make_map(seed, grid, 3, classes)
    if abs(matrix - np.eye(2, 3)).max() <= 1e-6:
        return
    found_ids, found, covered = roi_align_topk(ids, probabilities, matrix, out_grid, s, classes)
    expected, expected_covered = by_hand(to_dense(ids, probabilities, classes), matrix, out_grid, s)
    np.testing.assert_allclose(covered, expected_covered, atol=1e-6)
    np.testing.assert_allclose(to_dense(found_ids, found, classes), expected, atol=1e-5)
    assert (found.sum(-1) <= covered + 1e-6).all()


def test_a_quarter_turn_turns_the_map():
    ids, probabilities = make_map(1, (3, 5), 2, 40)
    turn = np.array([[0, -1, 1], [1, 0, 0]], dtype=np.float32)
    found_ids, found, _ = roi_align_topk(ids, probabilities, turn, (5, 3), 1, 2)
    # The output's first row runs down the map's last column.
    np.testing.assert_array_equal(found_ids, np.rot90(ids))
    np.testing.assert_allclose(found, np.rot90(probabilities), rtol=1e-6)


@given(seeds, grids, boxes(), st.integers(1, 12))
def test_fewer_classes_are_the_best_of_all(seed, grid, box, m):
    ids, probabilities = make_map(seed, grid, 4, 12)
    relative = View.crop(*box).matrix
    out_grid = (10, 4)  # larger than any of the maps' grids: never the identity
    all_ids, every, _ = roi_align_topk(ids, probabilities, relative, out_grid, 2, 12)
    some_ids, some, _ = roi_align_topk(ids, probabilities, relative, out_grid, 2, m)
    assert (some_ids == all_ids[..., :m]).all() and (some == every[..., :m]).all()
    assert (np.diff(every, axis=-1) <= 0).all()
    ties = (np.diff(every, axis=-1) == 0) & (all_ids[..., 1:] >= 0)
    assert (np.diff(all_ids, axis=-1)[ties] > 0).all()


def test_the_kernel_leaves_its_scratch_row_clean():
    ids, probabilities = make_map(2, (7, 4), 5, 100, np.uint32)
    scratch, touched = np.zeros(100, np.float32), np.full(100, -7, np.int32)
    out_ids, out, covered = np.empty((3, 2, 2), np.int32), np.empty((3, 2, 2), np.float32), np.empty((3, 2), np.float32)
    roi_align_topk_into(
        ids, probabilities, 0.9, 0.1, -0.2, 0.0, 0.8, 0.1, WHOLE_MAP, 3, scratch, touched, out_ids, out, covered
    )
    assert not scratch.any()
    matrix = np.array([[0.9, 0.1, -0.2], [0, 0.8, 0.1]])
    expected = roi_align_topk(ids, probabilities, matrix, (3, 2), 3, 2)
    for found, wanted in zip((out_ids, out, covered), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_ids": np.zeros((2, 2), np.uint16)}, "label map is"),
        ({"class_ids": np.zeros((2, 3, 1), np.uint16)}, "label map is"),
        ({"class_ids": np.zeros((2, 2, 1), np.float32)}, "integers"),
        ({"class_ids": np.full((2, 2, 1), -1)}, "negative"),
        ({"relative_view": np.eye(3)}, "2×3"),
        ({"out_grid": (0, 2)}, "positive"),
        ({"sampling_ratio": 0}, "positive"),
        ({"m": 0}, "positive"),
    ],
)
def test_arguments_that_do_not_fit(changes, words):
    arguments = {
        "class_ids": np.zeros((2, 2, 1), np.uint16),
        "probabilities": np.ones((2, 2, 1), np.float32),
        "relative_view": np.eye(2, 3),
        "out_grid": (2, 2),
        "sampling_ratio": 2,
        "m": 1,
    }
    with pytest.raises(InputError, match=words):
        roi_align_topk(**{**arguments, **changes})
