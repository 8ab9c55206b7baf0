"""The PNG of label maps: what it shows, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError, TargetError
from stl_offline.geometry import View
from stl_offline.palette import CONFIDENT, UNCONFIDENT, class_color
from stl_offline.reports.encode import see_through, shrink
from stl_offline.reports.panels import OVERLAY, draw_cells, own_cells
from stl_offline.reports.png import label_figure
from stl_offline.reports.scene import Scene, TokenMap

NAMES = ("disc", "ring", "a $name^ that looks like mathematics and is long", "heart")


def tokens(grid=(6, 10), pixels=None, seed=5, aspect=1.6) -> TokenMap:
    draw = np.random.default_rng(seed)
    best = draw.integers(0, 4, grid)
    probabilities = np.sort(draw.dirichlet(np.ones(2), grid), axis=-1)[..., ::-1]
    return TokenMap(
        np.stack([best, (best + 1) % 4], axis=-1), probabilities, draw.integers(-1, 4, grid), pixels, aspect
    )


def scene(view=None, shown=True, key="ring/0$1$.jpg") -> Scene:
    image = np.random.default_rng(1).integers(0, 256, (48, 80, 3), dtype=np.uint8) if shown else None
    student = None if view is None else tokens((4, 3), None if image is None else see_through(image, view, (64, 64)))
    return Scene(key, 1, 0, View.identity(), image, tokens(pixels=image), view, student)


def pixels_of(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of a written image."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_row_for_each_scene_and_columns_for_what_is_there(tmp_path):
    view = View.crop(0.25, 0.1, 0.5, 0.75).flipped()
    shapes = {}
    for name, scenes in {
        "maps": [scene()],
        "student": [scene(view)],
        "two": [scene(view), scene(view)],
        "alone": [scene(shown=False)],
        "mixed": [scene(view), scene(view, shown=False)],
    }.items():
        label_figure(scenes, NAMES, tmp_path / f"{name}.png", 0.5)
        shapes[name] = pixels_of(tmp_path / f"{name}.png").shape
    assert shapes["student"][1] > shapes["maps"][1] + 300  # three more columns
    assert shapes["two"][0] > shapes["student"][0] + 130  # one more row
    assert shapes["alone"][1] < shapes["maps"][1] - 100  # no column of images
    assert shapes["mixed"] == shapes["two"]


def test_the_same_scenes_give_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        label_figure([scene(View.identity())], NAMES, tmp_path / name, 0.5)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_labels_appear_in_their_classes_colours(tmp_path):
    black = np.zeros((32, 32, 3), np.uint8)
    ids = np.full((4, 4, 1), 3)
    whole = TokenMap(ids, np.ones((4, 4, 1)), np.full((4, 4), 3), black, 1.0)
    label_figure([Scene("heart", 3, 0, View.identity(), black, whole)], NAMES, tmp_path / "heart.png", 0.5)
    pixels = pixels_of(tmp_path / "heart.png").reshape(-1, 3)
    # In the legend as it is, on the map laid over the (black) image, and as a confident token of its own class.
    for color in (np.array(class_color(3)), OVERLAY * np.array(class_color(3)), OVERLAY * np.array(CONFIDENT)):
        assert (np.abs(pixels - np.round(color * 255)).max(axis=1) <= 3).sum() > 20, f"no pixels of {color}"


def test_the_foreground_is_split_at_the_threshold():
    found = TokenMap(np.array([[[1], [1], [2]]]), np.array([[[0.5], [0.49], [0.9]]]), np.array([[1, 2, -1]]), None, 3.0)
    cells = own_cells(found, 1, 0.5)
    opacity, colors = cells[..., 3], cells[..., :3]
    assert (opacity > 0).tolist() == [[True, True, False]]
    assert (colors[0, 0] == np.round(np.array(CONFIDENT) * 255)).all()
    assert (colors[0, 1] == np.round(np.array(UNCONFIDENT) * 255)).all()
    opacity = draw_cells(found)[..., 3].astype(int)
    assert opacity[0, 0] > opacity[0, 1] > opacity[0, 2] == 0  # kept, another class, none


def test_a_crop_shows_the_pixels_of_its_box():
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    view = View.crop(15 / 60, 10 / 40, 20 / 60, 24 / 40)
    box = image[10:34, 15:35]
    assert (see_through(image, view, (24, 20)) == box).all()
    assert (see_through(image, view.flipped(), (24, 20)) == box[:, ::-1]).all()


def test_turned_views_and_views_off_the_image_take_nearest_pixels():
    image = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    # Output (u, v) shows the source at (1 − v, u): numpy's quarter turn counts from the top right corner, too.
    turned = View(np.array([[0.0, -1.0, 1.0], [1.0, 0.0, 0.0]]))
    assert (see_through(image, turned, (30, 30)) == np.rot90(image)).all()
    outside = see_through(image, View.crop(-0.5, 0.0, 1.0, 1.0), (30, 30))
    assert (outside[:, :15] == image[:, :1]).all()  # the border repeats
    assert (outside[:, 15:] == image[:, :15]).all()


def test_large_images_are_made_smaller_and_small_ones_left():
    image = np.zeros((200, 400, 3), np.uint8)
    assert shrink(image, 100).shape == (50, 100, 3)
    assert shrink(image, 400) is image


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_ids": np.zeros((4, 4))}, "Gh, Gw, k"),
        ({"probabilities": np.zeros((6, 9, 2))}, "probabilities"),
        ({"drawn": np.zeros((6, 9))}, "draw"),
        ({"pixels": np.zeros((4, 4, 3), np.float32)}, "float32"),
        ({"pixels": np.zeros((4, 4), np.uint8)}, "uint8"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    good = tokens()
    fields = {name: getattr(good, name) for name in ("class_ids", "probabilities", "drawn", "pixels", "aspect")}
    with pytest.raises(InputError, match=words):
        TokenMap(**(fields | change))


def test_no_scenes_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        label_figure([], NAMES, tmp_path / "x.png", 0.5)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="file"):
        label_figure([scene()], NAMES, tmp_path / "file" / "x.png", 0.5)
