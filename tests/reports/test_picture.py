"""The picture of label maps: what it shows, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError, TargetError
from stl_offline.geometry import View
from stl_offline.reports.picture import UNLABELLED, FigureSample, class_color, label_figure, see_through

NAMES = ("disc", "ring", "a $name^ that looks like mathematics and is long", "heart")


def sample(height=48, width=80, view=None, title="ring/0$1$.jpg") -> FigureSample:
    rng = np.random.default_rng(5)
    return FigureSample(
        image=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        class_ids=rng.integers(0, 4, (6, 10)),
        confidence=rng.random((6, 10), dtype=np.float32),
        title=title,
        view=view,
        drawn_ids=None if view is None else rng.integers(-1, 4, (4, 3)),
    )


def pixels_of(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of a written picture."""
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_a_row_for_each_sample_and_columns_for_the_student(tmp_path):
    view = View.crop(0.25, 0.1, 0.5, 0.75).flipped()
    label_figure([sample()], NAMES, tmp_path / "maps.png")
    label_figure([sample(view=view), sample(64, 64, view)], NAMES, tmp_path / "targets.png")
    maps, targets = (pixels_of(tmp_path / name).shape for name in ("maps.png", "targets.png"))
    assert targets[1] > maps[1] + 300  # two more columns
    assert targets[0] > maps[0] + 150  # one more row


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one.png", "two.png"):
        label_figure([sample(view=View.identity())], NAMES, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


def test_labels_appear_in_their_classes_colours(tmp_path):
    whole = FigureSample(
        image=np.zeros((32, 32, 3), np.uint8),
        class_ids=np.full((4, 4), 3),
        confidence=np.ones((4, 4), np.float32),
        title="",
    )
    label_figure([whole], NAMES, tmp_path / "heart.png")
    pixels = pixels_of(tmp_path / "heart.png").reshape(-1, 3)
    # In the legend as it is, on the map laid over the (black) picture.
    for share in (1.0, 0.72):
        color = np.round(np.array(class_color(3)) * 255 * share)
        assert (np.abs(pixels - color).max(axis=1) <= 2).sum() > 20, f"no pixels of {share} times the class's colour"


def test_colours_depend_on_the_class_alone_and_differ():
    colors = [class_color(class_id) for class_id in range(1000)]
    assert len(set(colors)) == 1000
    assert UNLABELLED not in colors
    assert class_color(-1) == UNLABELLED
    distances = np.linalg.norm(np.array(colors[:10])[:, None] - np.array(colors[:10]), axis=-1)
    assert distances[~np.eye(10, dtype=bool)].min() > 0.2


def test_a_crop_shows_the_pixels_of_its_box():
    image = np.arange(40 * 60 * 3, dtype=np.uint32).reshape(40, 60, 3).astype(np.uint8)
    view = View.crop(15 / 60, 10 / 40, 20 / 60, 20 / 40)
    box = image[10:30, 15:35]
    assert (see_through(image, view, side=20) == box).all()
    assert (see_through(image, view.flipped(), side=20) == box[:, ::-1]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image": np.zeros((4, 4), np.uint8)}, "uint8"),
        ({"image": np.zeros((4, 4, 3), np.float32)}, "float32"),
        ({"confidence": np.zeros((6, 9))}, "one grid"),
        ({"view": View.identity()}, "go together"),
        ({"view": View.identity(), "drawn_ids": np.zeros(4)}, "grid"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, words):
    good = sample()
    fields = {name: getattr(good, name) for name in ("image", "class_ids", "confidence", "title")}
    with pytest.raises(InputError, match=words):
        FigureSample(**(fields | change))


def test_no_samples_or_mixed_ones_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        label_figure([], NAMES, tmp_path / "x.png")
    with pytest.raises(InputError, match="every sample"):
        label_figure([sample(), sample(view=View.identity())], NAMES, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TargetError, match="file"):
        label_figure([sample()], NAMES, tmp_path / "file" / "x.png")
