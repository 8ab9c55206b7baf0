"""Views: crops, flips, products, inverses; properties that hold for every view."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stl_offline.errors import InputError
from stl_offline.geometry import View, cells_in_boxes, compose_views, relative_view

sides = st.floats(2.0**-6, 1.0, width=32)
offsets = st.floats(-0.5, 1.0, width=32)
crops = st.builds(View.crop, offsets, offsets, sides, sides)
entries = st.floats(-2, 2, width=32)


@st.composite
def views(draw):
    matrix = np.array([[draw(entries) for _ in range(3)] for _ in range(2)], dtype=np.float32)
    assume(abs(np.linalg.det(matrix[:, :2].astype(np.float64))) > 0.05)
    return View(matrix)


points = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5).map(np.array)


def test_a_crop_takes_corners_to_corners():
    view = View.crop(left=0.25, top=0.5, width=0.5, height=0.125)
    np.testing.assert_array_equal(view.matrix, np.array([[0.5, 0, 0.25], [0, 0.125, 0.5]], dtype=np.float32))
    # u to the right, v down: the second corner is right of the first, the third is below it.
    np.testing.assert_array_equal(view([[0, 0], [1, 0], [0, 1]]), [[0.25, 0.5], [0.75, 0.5], [0.25, 0.625]])


def test_a_flip_mirrors_left_to_right_only():
    view = View.crop(0.25, 0.5, 0.5, 0.125).flipped()
    np.testing.assert_array_equal(view.matrix, np.array([[-0.5, 0, 0.75], [0, 0.125, 0.5]], dtype=np.float32))
    assert view.box() == (0.25, 0.5, 0.5, 0.125, True)


def test_pixels_of_a_crop():
    # Columns 30 to 69 and rows 10 to 29 of an image 200 wide and 50 high.
    view = View.crop(30 / 200, 10 / 50, 40 / 200, 20 / 50)
    np.testing.assert_allclose(view([[0.5 / 40, 0.5 / 20]]) * [200, 50], [[30.5, 10.5]], atol=1e-4)


@given(crops)
def test_boxes_come_back(view):
    left, top, width, height, flipped = view.box()
    assert not flipped
    assert View.crop(left, top, width, height) == view
    mirrored = view.flipped().box()
    np.testing.assert_allclose(mirrored[:4], (left, top, width, height), atol=1e-6)
    assert mirrored[4]


@given(views(), views(), points)
def test_products_apply_the_inner_view_first(outer, inner, points):
    np.testing.assert_allclose((outer @ inner)(points), outer(inner(points)), atol=1e-8)


@given(views(), views(), views())
def test_products_associate(a, b, c):
    np.testing.assert_allclose(((a @ b) @ c).matrix, (a @ (b @ c)).matrix, atol=1e-5)


@given(views())
def test_a_view_relative_to_itself_is_the_identity_to_the_bit(view):
    assert (view.inverse() @ view).matrix.tobytes() == View.identity().matrix.tobytes()
    assert relative_view(view, view).matrix.tobytes() == np.eye(2, 3, dtype=np.float32).tobytes()


@given(crops)
def test_a_stored_view_relative_to_itself_is_the_identity_to_the_bit(view):
    for made in (view, view.flipped()):
        stored = View.from_array(made.matrix.ravel())
        assert relative_view(stored, made).matrix.tobytes() == np.eye(2, 3, dtype=np.float32).tobytes()


@given(views(), points)
def test_inverses_undo(view, points):
    np.testing.assert_allclose(view.inverse()(view(points)), points, atol=1e-5)


@given(crops, crops, points)
def test_relative_views_meet_in_the_source(map_view, student_view, points):
    relative = relative_view(map_view, student_view)
    np.testing.assert_allclose(map_view(relative(points)), student_view(points), atol=1e-6)


@given(views())
def test_flipping_twice_changes_nothing(view):
    np.testing.assert_allclose(view.flipped().flipped().matrix, view.matrix, atol=1e-6)


def test_equal_views_are_equal_and_hash_alike():
    assert View.crop(0, 0, 1, 1) == View.identity()
    assert len({View.crop(0, 0, 1, 1), View.identity(), View.crop(0, 0, 1, 0.5)}) == 2
    assert View.identity() != "identity"
    assert "0.25" in repr(View.crop(0.25, 0, 0.5, 1))


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (np.eye(3), "2×3"),
        ([[1, 0, np.nan], [0, 1, 0]], "finite"),
        ([[1, 1, 0], [1, 1, 0]], "inverse"),
        ([[0, 0, 0.5], [0, 1, 0]], "inverse"),
    ],
)
def test_matrices_that_are_no_view(matrix, words):
    with pytest.raises(InputError, match=words):
        View(np.array(matrix))


@pytest.mark.parametrize(("width", "height"), [(0, 0.5), (0.5, -0.1), (np.nan, 0.5)])
def test_empty_crops_are_refused(width, height):
    with pytest.raises(InputError, match="positive size"):
        View.crop(0, 0, width, height)


def test_a_rotation_has_no_box():
    with pytest.raises(InputError, match="not a crop"):
        View(np.array([[0, 1, 0], [-1, 0, 1]])).box()
    with pytest.raises(InputError, match="not a crop"):
        View(np.array([[1, 0, 0], [0, -1, 1]])).box()
    with pytest.raises(TypeError):
        View.identity() @ 3


@given(st.lists(st.tuples(views(), crops), min_size=1, max_size=4))
def test_many_products_at_once_are_the_single_ones(pairs):
    outer, inner = (np.stack([view.matrix.ravel() for view in side]) for side in zip(*pairs, strict=True))
    expected = [(first @ second).matrix.ravel() for first, second in pairs]
    np.testing.assert_allclose(compose_views(outer, inner), expected, rtol=1e-6, atol=1e-7)
    identity = np.tile(View.identity().matrix.ravel(), (len(pairs), 1))
    np.testing.assert_array_equal(compose_views(outer, identity), outer)


def test_boxes_cover_parts_of_cells():
    # Nine pixels are two rows of 4.5: rows 3 to 7 cover a third of the first and 2.5 of 4.5 of the second.
    shares = cells_in_boxes(np.array([[3, 7, 0, 4], [0, 0, 0, 0], [0, 9, 0, 8]]), (9, 8), (2, 4))
    np.testing.assert_allclose(shares[0], np.outer([1.5 / 4.5, 2.5 / 4.5], [1, 1, 0, 0]), atol=1e-6)
    np.testing.assert_array_equal(shares[1:], [np.zeros((2, 4)), np.ones((2, 4))])
