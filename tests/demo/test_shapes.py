"""The embedded data set: fair (outline and weave alone tell the class), balanced, repeatable, with true masks."""

import hashlib

import cv2
import numpy as np
import pytest

from stl_offline.demo.drawing import draw_shape
from stl_offline.demo.outlines import OUTLINES, outline_moments
from stl_offline.demo.shapes import CLASS_NAMES, write_shapes
from stl_offline.errors import InputError, TargetError
from stl_offline.images.beton import open_beton
from stl_offline.images.masks import read_masks
from stl_offline.images.pack import pack

AXIS = np.linspace(-1.6, 1.6, 321)
X, Y = np.meshgrid(AXIS, AXIS)


@pytest.fixture(scope="module")
def drawings():
    """30 images a class: pixels (n, H, W, 3), masks (n, H, W), class numbers (n,)."""
    drawn = [
        (draw_shape(name, 3, 0, number, 64), label)
        for label, name in enumerate(CLASS_NAMES)
        for number in range(1000 * label, 1000 * label + 30)
    ]
    pixels = np.stack([drawing.pixels for drawing, _ in drawn])
    return pixels, np.stack([drawing.mask for drawing, _ in drawn]), np.array([label for _, label in drawn])


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_outlines_are_distances(name):
    distance = OUTLINES[name](X, Y)
    # Never steeper than one: the edge that antialiasing makes of it is one pixel wide, not thinner.
    steepness = np.hypot(*np.gradient(distance, AXIS, AXIS))
    assert np.percentile(steepness, 99) < 1.02 and np.median(steepness) > 0.8
    inside = distance < 0
    assert not inside[np.maximum(abs(X), abs(Y)) > 1.3].any(), "reaches too far"
    area, x, y = outline_moments(name)
    assert area == pytest.approx(inside.sum() * 0.01**2, rel=0.02)
    assert (x, y) == pytest.approx((X[inside].mean(), Y[inside].mean()), abs=0.01)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_outlines_are_one_piece_and_only_the_ring_has_a_hole(name):
    inside = OUTLINES[name](X, Y) < 0
    assert cv2.connectedComponents(inside.astype(np.uint8))[0] - 1 == 1
    assert cv2.connectedComponents((~inside).astype(np.uint8))[0] - 1 == (2 if name == "ring" else 1)


def test_outlines_have_the_features_of_their_names():
    def inside(name, x, y):
        return bool(OUTLINES[name](np.array(x), np.array(y)) < 0)

    assert not inside("ring", 0, 0) and inside("disc", 0, 0) and inside("ring", 0.76, 0)
    assert not inside("crescent", 0.5, 0) and inside("crescent", -0.8, 0)
    assert not inside("cross", 0.7, 0.7) and inside("square", 0.7, 0.7) and inside("cross", 0.9, 0)
    assert not inside("heart", 0, -0.7) and inside("heart", 0.5, -0.7)
    assert inside("arrow", 0, 0.9) and not inside("arrow", 0.5, 0.5) and inside("arrow", 0.7, -0.2)
    assert inside("drop", 0, -1) and not inside("drop", 0.5, -0.8) and inside("drop", 0.5, 0.4)
    assert outline_moments("disc")[0] == pytest.approx(np.pi, rel=0.01)
    assert outline_moments("square")[0] == pytest.approx(1.7**2, rel=0.01)


@pytest.mark.parametrize(("name", "fold"), [("star", 5), ("square", 4), ("cross", 4), ("ring", 7)])
def test_symmetry(name, fold):
    angle = 2 * np.pi / fold
    turned = OUTLINES[name](X * np.cos(angle) - Y * np.sin(angle), Y * np.cos(angle) + X * np.sin(angle))
    assert np.allclose(turned, OUTLINES[name](X, Y), atol=1e-9)


def test_images_and_masks_are_whole(drawings):
    pixels, masks, _ = drawings
    assert pixels.shape == (300, 64, 64, 3) and pixels.dtype == np.uint8
    assert masks.shape == (300, 64, 64) and masks.dtype == bool
    shares = masks.mean(axis=(1, 2))
    assert shares.min() > 0.05 and shares.max() < 0.3
    assert pixels.std(axis=(1, 2, 3)).min() > 8, "an image without contrast"


def test_masks_lie_where_the_object_is(drawings):
    pixels, masks, _ = drawings
    distances, edges = [], []
    for image, mask in zip(pixels.astype(float), masks, strict=True):
        distances.append(np.linalg.norm(image[mask].mean(axis=0) - image[~mask].mean(axis=0)))
        step = np.abs(np.diff(image, axis=1)).sum(axis=2)
        border = mask[:, 1:] != mask[:, :-1]
        edges.append(step[border].mean() / step[~border].mean())
    assert np.median(distances) > 80  # the object has a colour of its own
    assert np.median(edges) > 2.5  # and its edge lies where the mask's does, to the pixel


def test_classes_differ_in_nothing_but_the_outline(drawings):
    pixels, masks, labels = drawings
    features = []
    for image, mask in zip(pixels.astype(float), masks, strict=True):
        rows, columns = np.nonzero(mask)
        features.append([*image[mask].mean(axis=0), *image[~mask].mean(axis=0), rows.mean(), columns.mean()])
    features = np.array(features)
    for column in features.T:
        groups = [column[labels == label] for label in range(len(CLASS_NAMES))]
        between = np.var([group.mean() for group in groups], ddof=1) * 30
        within = np.mean([group.var(ddof=1) for group in groups])
        assert between / within < 3.2  # F(9, 290): one in a thousand
    # Hidden parts apart, the area is drawn alike for all.
    areas = np.array([masks[labels == label].mean() for label in range(len(CLASS_NAMES))])
    assert areas.max() / areas.min() < 1.35


def test_an_image_is_a_function_of_its_arguments():
    first = draw_shape("star", 5, 0, 77, 64)
    again = draw_shape("star", 5, 0, 77, 64)
    assert (first.pixels == again.pixels).all() and (first.mask == again.mask).all()
    for other in (("star", 6, 0, 77), ("star", 5, 1, 77), ("star", 5, 0, 78)):
        assert (draw_shape(*other, 64).pixels != first.pixels).mean() > 0.9


@pytest.mark.parametrize("size", [16, 33, 96])
def test_other_sizes(size):
    drawing = draw_shape("heart", 0, 0, 0, size)
    assert drawing.pixels.shape == (size, size, 3) and 0.05 < drawing.mask.mean() < 0.3


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_data_set_on_disk(tmp_path):
    folder = write_shapes(tmp_path / "shapes", train=30, val=20, seed=1)
    report = pack(folder / "train", tmp_path / "train.beton")
    assert (report.samples, report.classes, report.stored_as_is) == (30, 10, 30)
    beton = open_beton(report.path)
    assert beton.class_names == CLASS_NAMES and np.bincount(beton.class_ids).tolist() == [3] * 10
    assert set(zip(beton.heights, beton.widths, strict=True)) == {(64, 64)}
    masks = read_masks(folder / "masks-train.npz")
    assert list(masks) == beton.keys and all(mask.shape == (64, 64) for mask in masks.values())
    row = beton.keys.index("heart/00015.jpg")
    drawing = draw_shape("heart", 1, 0, 15, 64)
    assert (masks["heart/00015.jpg"] == drawing.mask).all()
    assert np.abs(beton.read_image(row).astype(int) - drawing.pixels).mean() < 4
    assert len(read_masks(folder / "masks-val.npz")) == 20
    assert set(read_masks(folder / "masks-val.npz")) == set(
        open_beton(pack(folder / "val", tmp_path / "val.beton").path).keys
    )


def test_the_same_arguments_give_the_same_files_and_are_not_drawn_twice(tmp_path):
    arguments = {"train": 20, "val": 10, "seed": 9, "size": 32}
    first = hashes(write_shapes(tmp_path / "a", **arguments))
    assert hashes(write_shapes(tmp_path / "b", **arguments)) == first and len(first) == 33
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    write_shapes(tmp_path / "a", **arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == times
    assert hashes(write_shapes(tmp_path / "c", **{**arguments, "seed": 8})) != first


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    write_shapes(tmp_path / "a", train=10, val=10)
    before = hashes(tmp_path / "a")
    with pytest.raises(TargetError, match="already holds other files"):
        write_shapes(tmp_path / "a", train=20, val=10)
    assert hashes(tmp_path / "a") == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(TargetError, match="already holds other files"):
        write_shapes(tmp_path / "mine", train=10, val=10)
    (tmp_path / "empty").mkdir()
    assert write_shapes(tmp_path / "empty", train=10, val=10).joinpath("train").is_dir()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"train": 25}, "train must be a multiple of the 10 classes, got 25"),
        ({"val": 0}, "val must be a multiple"),
        ({"seed": -1}, "at least 0"),
        ({"size": 8}, "at least 16 pixels"),
    ],
)
def test_arguments_that_cannot_be_used(arguments, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        write_shapes(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_faults_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(TargetError, match="cannot make the folder"):
        write_shapes(tmp_path / "file" / "x", train=10, val=10)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(TargetError, match="No space left on device; choose another folder"):
        write_shapes(tmp_path / "y", train=10, val=10)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
