"""Token labels called for a batch: the loader's own targets, by key or by place, in any process."""

import pickle

import numpy as np
import pytest

from stl_offline.errors import InputError, JoinError
from stl_offline.geometry import View, draw_views
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.keys import KeyIndex
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.targets import TokenLabels, TokenTargets
from tests.loops.conftest import CROPS, GRID

KINDS = (
    ("gumbel", {}),
    ("gumbel", {"residual": "class"}),
    ("gumbel", {"residual": "ghost", "min_confidence": 0.3}),
    ("soft", {"m": 3, "residual": "uniform"}),
    ("soft", {"m": 3, "residual": "class"}),
    ("soft", {"m": 3, "residual": "ghost"}),
    ("argmax", {"min_confidence": 0.3}),
)


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_targets_are_the_loaders_for_the_same_views(kind, options, beton, whole, cropped):
    for label_set, epoch in ((whole, 4), (cropped, 5)):
        cache = build_token_cache(label_set, beton.keys, beton.content_hashes, beton.class_names)
        labels = TokenLabels(TokenTargets(kind, GRID, **options), cache)
        everything = np.arange(len(beton))
        views = draw_views(9, epoch, everything, beton.heights, beton.widths, CROPS)
        maps = np.full(len(beton), epoch % cache.views.shape[1])
        loader = TokenLoader(beton, ImageSettings((24, 32)), 4, labels=labels, seed=11)
        with loader.epoch(epoch, views, map_index=maps) as batches:
            for batch in batches:
                samples = batch.sample_ids.numpy()
                own = batch.class_ids.numpy()
                ids, weights = labels(samples, views[samples], epoch, seed=11, class_ids=own)
                np.testing.assert_array_equal(ids, batch.token_ids.numpy())
                np.testing.assert_array_equal(weights, batch.token_weights.numpy())
        loader.close()


def test_keys_name_the_same_samples(beton, whole):
    by_key = TokenLabels.of(whole, GRID, "soft", m=2)
    cache = build_token_cache(whole, beton.keys, beton.content_hashes, beton.class_names)
    by_place = TokenLabels(TokenTargets("soft", GRID, m=2), cache)
    keys = [beton.keys[place] for place in (3, 0, 14)]
    views = [View.crop(0.1, 0.2, 0.5, 0.6), View.identity(), View.crop(0.5, 0, 0.5, 1).flipped()]
    for found, expected in zip(by_key(keys, views), by_place([3, 0, 14], views), strict=True):
        assert found.shape == (3, 12, 2)
        np.testing.assert_array_equal(found, expected)
    assert by_key.class_names == beton.class_names


def test_samples_without_labels(beton, some):
    strict = TokenLabels.of(some, GRID)
    with pytest.raises(JoinError, match='2 of 15 samples have no label, such as .*missing="skip"'):
        strict.rows(beton.keys)
    labels = TokenLabels.of(some, GRID, missing="skip")
    rows = labels.rows(beton.keys)
    assert (rows < 0).sum() == 2
    ids, weights = labels(beton.keys, np.tile(np.float32([1, 0, 0, 0, 1, 0]), (15, 1)))
    assert (ids[rows < 0] == -1).all() and not weights[rows < 0].any()
    assert weights[rows >= 0].any(axis=(1, 2)).all()


def test_stored_crops_replay_the_labels(beton, whole, cropped):
    labels = TokenLabels.of(cropped, cropped.spec.grid, "soft", m=cropped.spec.top_k)
    assert TokenLabels.of(whole, GRID).stored_views([0], 0) is None
    for epoch in (0, 4):
        views = labels.stored_views(beton.keys, epoch)
        ids, weights = labels(beton.keys, views, epoch)
        for place in (0, 7):
            stored = cropped[beton.keys[place]]
            np.testing.assert_array_equal(views[place], stored.views[epoch % 3])
            np.testing.assert_array_equal(ids[place], stored.class_ids[epoch % 3].reshape(ids.shape[1:]))
            expected = stored.probabilities()[epoch % 3].reshape(ids.shape[1:])
            np.testing.assert_array_equal(weights[place], expected)
    # A sample without label has no crop, and needs none.
    skipping = TokenLabels.of(cropped, cropped.spec.grid, "soft", missing="skip")
    views = skipping.stored_views([beton.keys[0], "new"], 0)
    assert np.isfinite(views[0]).all() and np.isnan(views[1]).all()
    ids, weights = skipping([beton.keys[0], "new"], views)
    assert weights[0].any() and not weights[1].any() and (ids[1] == -1).all()
    with pytest.raises(InputError, match="are of 2 caches, each with crops of its own"):
        TokenLabels(labels.targets, [labels.cache, labels.cache]).stored_views([0], 0)


def test_worker_processes_map_the_files_again(whole):
    labels = TokenLabels.of(whole, GRID)
    data = pickle.dumps(labels)
    assert len(data) < 5000  # the path, not the arrays
    again = pickle.loads(data)
    views = np.tile(np.float32([0.5, 0, 0.2, 0, 0.5, 0.1]), (2, 1))
    for ours, theirs in zip(labels([1, 2], views, 3), again([1, 2], views, 3), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_wrong_arguments(whole):
    labels = TokenLabels.of(whole, GRID)
    view = np.float32([[1, 0, 0, 0, 1, 0]])
    with pytest.raises(InputError, match="numbers in 0 … 14"):
        labels([15], view)
    with pytest.raises(InputError, match="views are six finite numbers; that of 1 is .*nan"):
        labels([0, 1], np.concatenate([view, np.full((1, 6), np.nan)]))
    with pytest.raises(InputError, match=r"1 samples need as many views of six numbers, got \(1, 4\)"):
        labels([0], view[:, :4])
    with pytest.raises(InputError, match="map_index must be 1 numbers in 0 … 0"):
        labels([0], view, map_index=np.array([1]))
    by_class = TokenLabels.of(whole, GRID, residual="class")
    with pytest.raises(InputError, match="needs the classes of the images: give them as class_ids"):
        by_class([0], view)
    with pytest.raises(InputError, match="class_ids must be 1 numbers in 0 … "):
        by_class([0], view, class_ids=np.array([99]))
    with pytest.raises(InputError, match="have none; use `TokenLabels.of`"):
        TokenLabels(labels.targets, labels.cache)(["a"], view)
    with pytest.raises(InputError, match="missing must be one of error, skip"):
        TokenLabels.of(whole, GRID, missing="drop")
    assert labels([], np.empty((0, 6), np.float32))[0].shape == (0, 12, 1)


def test_key_index():
    index = KeyIndex.of(["b/x", "a", "ü"])
    assert index.rows(["ü", "c", "b/x", "a"]).tolist() == [2, -1, 0, 1]
    with pytest.raises(InputError, match="the key 'a' is there twice"):
        KeyIndex.of(["a", "b", "a"])
