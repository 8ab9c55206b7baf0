"""Panels: one list for the page and the PNG, in colours that training's logs share."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Polygon

from stl_offline.geometry import View
from stl_offline.labels.label_set import open_label_set
from stl_offline.palette import class_color
from stl_offline.reports.panels import CROP, LABELER_CROP, LABELS, TITLES, confidence_pixels, scene_panels
from stl_offline.reports.png import label_figure
from stl_offline.reports.preview import scene_article
from stl_offline.reports.scene import Scene, StudentSettings, TokenMap, make_scenes
from stl_offline.training.watch import _map_image


@pytest.fixture
def drawn(monkeypatch):
    """Every text and image that matplotlib is given for axes."""
    found = {"texts": [], "images": []}
    for name, kind in (("text", "texts"), ("imshow", "images")):
        original = getattr(Axes, name)

        def noted(self, *arguments, original=original, kind=kind, **options):
            found[kind].append(arguments[2] if kind == "texts" else arguments[0])
            return original(self, *arguments, **options)

        monkeypatch.setattr(Axes, name, noted)
    return found


@pytest.mark.parametrize("maps", [1, 3], ids=["whole", "crops"])
def test_the_png_and_the_page_paint_the_same_panels(make_labels, maps, drawn, tmp_path):
    label_set = open_label_set(make_labels(maps=maps))
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    (scene,) = make_scenes(label_set.spec, label_set[next(iter(label_set))], image, 5, StudentSettings(), (maps - 1,))
    names = label_set.spec.class_names
    panels = scene_article(scene, names, 0.5, {}).panels
    titles = [panel.title for panel in panels]
    assert titles == [title for title in TITLES if title in titles]
    assert (CROP in titles, LABELER_CROP in titles) == ((True, False) if maps == 1 else (False, True))
    label_figure([scene], names, tmp_path / "x.png", 0.5)
    assert drawn["texts"][: len(titles)] == titles
    for panel in panels:
        if panel.cells is not None:
            assert any(np.array_equal(panel.cells, image) for image in drawn["images"]), panel.title


def test_the_students_crop_is_outlined_on_the_map_that_it_is_seen_through():
    # The map covers the right half; a crop of the image's right quarter is the right half of the map.
    tokens = TokenMap(np.zeros((2, 2, 1), int), np.ones((2, 2, 1)), np.zeros((2, 2), int), None, 0.5)
    scene = Scene("k", 0, 0, View.crop(0.5, 0, 0.5, 1), None, tokens, View.crop(0.75, 0, 0.25, 1), tokens)
    (labels,) = [panel for panel in scene_panels(scene, ("a",), 0.5) if panel.title == LABELS]
    assert np.allclose(labels.outline.matrix, View.crop(0.5, 0, 0.5, 1).matrix)


def test_outlines_of_the_png_lie_where_the_view_is(monkeypatch, tmp_path):
    tokens = TokenMap(np.zeros((2, 4, 1), int), np.ones((2, 4, 1)), np.zeros((2, 4), int), None, 2.0)
    scene = Scene("k", 0, 0, View.identity(), None, tokens, View.crop(0.25, 0, 0.5, 0.5), tokens)
    found = []
    monkeypatch.setattr(Axes, "add_patch", lambda self, patch: found.append(patch))
    label_figure([scene], ("a",), tmp_path / "x.png", 0.5)
    outline = next(patch for patch in found if isinstance(patch, Polygon)).get_xy()
    # Twice as wide as high, so one by a half; the upper half of it is above 0.25.
    assert np.allclose(outline[:4], [[0.25, 0.5], [0.75, 0.5], [0.75, 0.25], [0.25, 0.25]])


def test_confidence_grows_lighter():
    values = confidence_pixels(np.linspace(0, 1, 50)) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    assert (np.diff(linear @ [0.2126, 0.7152, 0.0722]) > 0).all()


def test_training_logs_label_maps_in_the_same_colours():
    ids = torch.tensor([[3, 999, -1, 12]])
    image = _map_image(ids, torch.tensor([[1.0, 0.5, 1.0, 1.0]]), (2, 2), (4, 4))
    assert image.shape == (1, 3, 4, 4)
    for row, column, class_id, brightness in ((0, 0, 3, 1.0), (0, 3, 999, 0.5), (3, 0, -1, 1.0), (3, 3, 12, 1.0)):
        expected = [brightness * part for part in class_color(class_id)]
        assert image[0, :, row, column].tolist() == pytest.approx(expected, abs=0.003)
