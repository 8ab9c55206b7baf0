"""What a scene shows is what training uses: the same crops, the same alignment, the same draws."""

import numpy as np
import pytest

from stl_offline.geometry import CropSettings, View, draw_views, relative_view
from stl_offline.labels.label_set import open_label_set
from stl_offline.reports.html import token_data
from stl_offline.reports.scene import StudentSettings, make_scenes
from stl_offline.targets import TokenTargets, token_targets

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")

SETTINGS = StudentSettings(seed=7, epoch=3, crops=CropSettings(scale=(0.2, 0.6), flip=0.0))


@pytest.fixture
def scene_of(label_set):
    def make(place=3, sample_id=41, settings=SETTINGS, shown="noise"):
        label_map = label_set[list(label_set)[place]]
        image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8) if shown else None
        (scene,) = make_scenes(label_set.spec, label_map, image, sample_id, settings)
        return label_map, scene

    return make


def test_the_crop_is_the_one_that_the_loader_draws(scene_of):
    _, scene = scene_of()
    expected = draw_views(7, 3, [41], [50], [70], SETTINGS.crops)[0]
    assert (scene.student_view.matrix.ravel() == expected).all()
    assert scene_of(sample_id=42)[1].student_view != scene.student_view


def test_the_aligned_labels_are_torchvisions_roi_align(scene_of):
    label_map, scene = scene_of()
    dense = torch.from_numpy(label_map.dense()[0]).permute(2, 0, 1)[None]
    rows, columns = scene.tokens.grid
    left, top, width, height, flipped = scene.student_view.box()
    assert not flipped
    box = [left * columns, top * rows, (left + width) * columns, (top + height) * rows]
    boxes = torch.tensor([[0.0, *box]])
    expected = torchvision.ops.roi_align(dense, boxes, (rows, columns), sampling_ratio=2, aligned=True)[0]
    found = torch.zeros_like(expected)
    for (row, column, rank), class_id in np.ndenumerate(scene.student.class_ids):
        if class_id >= 0:
            found[class_id, row, column] = float(scene.student.probabilities[row, column, rank])
    # Everything is kept: twice the label's top 4 is more than the seven classes.
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_flip_mirrors_the_labels_and_the_pixels(scene_of):
    mirrored = StudentSettings(seed=7, epoch=3, crops=CropSettings(scale=(0.2, 0.6), flip=1.0))
    _, scene = scene_of()
    _, flipped = scene_of(settings=mirrored)
    assert (flipped.student.best == scene.student.best[:, ::-1]).all()
    assert np.allclose(flipped.student.probabilities, scene.student.probabilities[:, ::-1], atol=1e-6)
    assert (flipped.student.pixels == scene.student.pixels[:, ::-1]).all()


def test_draws_are_the_students(scene_of, label_set):
    label_map, scene = scene_of()
    arguments = (label_map.class_ids[0], label_map.probabilities()[0], label_map.confidence[0].astype(np.float32))
    targets = TokenTargets(kind="gumbel", grid=label_set.spec.grid, m=1)
    for view, drawn in ((View.identity(), scene.tokens.drawn), (scene.student_view, scene.student.drawn)):
        relative = relative_view(label_map.view(0), view).matrix
        ids, _ = token_targets(targets, *arguments, relative, label_set.spec.num_classes, seed=7, epoch=3, sample_id=41)
        assert (ids.reshape(drawn.shape) == drawn).all()
    kept = scene.tokens.kept
    assert kept.any() and not kept.all()
    assert (scene.tokens.drawn[kept] == label_map.class_ids[0, ..., 0][kept]).all()


@pytest.mark.parametrize("kind", [{"top_k": 0, "has_confidence": False}, {"top_k": 2}])
def test_draws_of_stored_draws_are_the_students(make_labels, kind):
    """They are drawn in the stored order, not in the order in which classes are listed."""
    label_set = open_label_set(make_labels(draws=4, **kind))
    label_map = label_set[list(label_set)[3]]
    (scene,) = make_scenes(label_set.spec, label_map, None, 41, SETTINGS)
    ids, masses = (part[0] for part in label_map.entries())
    targets = TokenTargets(kind="gumbel", grid=label_set.spec.grid, m=1)
    for view, drawn in ((View.identity(), scene.tokens.drawn), (scene.student_view, scene.student.drawn)):
        relative = relative_view(label_map.view(0), view).matrix
        expected, _ = token_targets(
            targets, ids, masses, masses[..., 0], relative, label_set.spec.num_classes, seed=7, epoch=3, sample_id=41
        )
        assert (expected.reshape(drawn.shape) == drawn).all()
    # A class is listed once, and nothing fills a row up.
    data = token_data(scene.tokens)
    listed = np.reshape(data["ids"], (-1, data["k"]))
    shares = np.reshape(data["p"], listed.shape)
    assert ((listed >= 0) == (shares > 0)).all() and (listed >= 0).any(axis=0).all()
    for row in listed:
        assert len(set(row[row >= 0])) == (row >= 0).sum()


def test_without_an_image_the_labelers_input_gives_the_shape(scene_of):
    _, scene = scene_of(shown=None)
    assert scene.image is scene.tokens.pixels is scene.student.pixels is None
    assert scene.tokens.aspect == pytest.approx(80 / 48)
    expected = draw_views(7, 3, [41], [48], [80], SETTINGS.crops)[0]
    assert (scene.student_view.matrix.ravel() == expected).all()


def test_crops_of_a_label_set_are_shown_as_the_labeler_saw_them(make_labels):
    label_set = open_label_set(make_labels(maps=3))
    label_map = label_set[list(label_set)[5]]
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    scenes = list(make_scenes(label_set.spec, label_map, image, 5, SETTINGS, (2, 0)))
    assert [scene.view_index for scene in scenes] == [2, 0]
    for scene in scenes:
        # Students replay the crop; there is no other to show.
        assert scene.student is scene.student_view is None
        assert scene.view == label_map.view(scene.view_index)
        assert (scene.tokens.class_ids == label_map.class_ids[scene.view_index]).all()
        assert scene.tokens.aspect == pytest.approx(80 / 48)
    assert not (scenes[0].tokens.pixels == scenes[1].tokens.pixels).all()
