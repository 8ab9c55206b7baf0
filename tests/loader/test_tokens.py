"""Token targets from the loader: those that plain numpy makes of the label set, for every sample.

N: tokens of the student; K: classes.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stl_offline.errors import InputError
from stl_offline.geometry import View, relative_view
from stl_offline.targets import TokenTargets
from tests.loader.conftest import CLASS_NAMES, random_views
from tests.targets import by_hand

GRID = (4, 3)
CLASSES = len(CLASS_NAMES)


def tokens_of(loader, epoch, views, **settings):
    """{sample id: (ids (N, m), weights (N, m))} of one epoch."""
    found = {}
    for batch in loader.epoch(epoch, views, **settings):
        assert batch.token_ids.dtype == torch.int64
        assert batch.token_weights.dtype == torch.float32
        rows = zip(batch.token_ids.numpy(), batch.token_weights.numpy(), strict=True)
        found |= dict(zip(batch.sample_ids.tolist(), rows, strict=True))
    return found


def label_map(label_set, beton, sample, index=0):
    """One sample's (class ids, probabilities, view), straight from the label set."""
    stored = label_set[beton.keys[sample]]
    return stored.class_ids[index], stored.probabilities()[index], stored.view(index)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("residual", ["ignore", "uniform", "class"])
def test_drawn_targets_are_those_made_by_hand(load, beton, make_labels, residual, workers):
    label_set, cache = make_labels()
    loader = load(
        tokens=TokenTargets("gumbel", GRID, residual=residual), cache=cache, workers=workers, seed=11, batch_size=4
    )
    for epoch in (0, 1, 5):
        views = random_views(beton, epoch)
        found = tokens_of(loader, epoch, views)
        assert len(found) == len(beton)
        for sample, (ids, weights) in found.items():
            class_ids, probabilities, view = label_map(label_set, beton, sample)
            matrix = relative_view(view, View.from_array(views[sample])).matrix
            own = beton.class_ids[sample]
            expected = by_hand.drawn(
                class_ids, probabilities, matrix, GRID, 2, residual, CLASSES, 11, epoch, sample, own
            )
            np.testing.assert_array_equal(ids[:, 0], expected[0])
            np.testing.assert_array_equal(weights[:, 0], expected[1])


@pytest.mark.parametrize("workers", [1, 2])
def test_soft_targets_are_those_made_by_hand(load, beton, make_labels, workers):
    label_set, cache = make_labels(top_k=3)
    loader = load(tokens=TokenTargets("soft", GRID, m=CLASSES, residual="uniform"), cache=cache, workers=workers)
    for epoch in (0, 3):
        views = random_views(beton, epoch)
        for sample, (ids, weights) in tokens_of(loader, epoch, views).items():
            class_ids, probabilities, view = label_map(label_set, beton, sample)
            matrix = relative_view(view, View.from_array(views[sample])).matrix
            dense, covered = by_hand.aligned(by_hand.to_dense(class_ids, probabilities, CLASSES), matrix, GRID, 2)
            full = np.zeros((len(ids), CLASSES + 1))
            np.add.at(full, (np.arange(len(ids))[:, None], ids), weights)
            np.testing.assert_allclose(full[:, :CLASSES], dense.reshape(-1, CLASSES), atol=2e-6)
            # Stored in half precision, a cell's sum may be a little above one.
            rest = np.maximum(covered - dense.sum(-1), 0).ravel()
            np.testing.assert_allclose(full[:, CLASSES], rest, atol=2e-6)


@pytest.mark.parametrize("kind", ["gumbel", "soft", "argmax"])
def test_workers_batches_order_and_restart_do_not_matter(load, views, make_labels, kind):
    _, cache = make_labels()
    targets = TokenTargets(kind, GRID, m=2, min_confidence=0.3)
    first = tokens_of(load(tokens=targets, cache=cache, batch_size=5, workers=1), 4, views)
    second = tokens_of(load(tokens=targets, cache=cache, batch_size=8, workers=2, shuffle=False), 4, views)
    loader = load(tokens=targets, cache=cache, batch_size=5, workers=2)
    rest = tokens_of(loader, 4, views, start_batch=3)
    for part in (second, rest):
        assert part
        for sample, pair in part.items():
            for mine, theirs in zip(pair, first[sample], strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_replayed_crops_give_their_stored_cells(load, beton, make_labels):
    label_set, cache = make_labels(maps=3, grid=GRID)
    loader = load(tokens=TokenTargets("soft", GRID, m=4), cache=cache, workers=2)
    for epoch in range(3):
        index = (np.arange(len(beton)) + epoch) % 3
        views = cache.views[np.arange(len(beton)), index]
        for sample, (ids, weights) in tokens_of(loader, epoch, views, map_index=index).items():
            class_ids, probabilities, _ = label_map(label_set, beton, sample, index[sample])
            np.testing.assert_array_equal(ids, class_ids.reshape(-1, 4))
            np.testing.assert_array_equal(weights, probabilities.reshape(-1, 4))


def test_samples_without_labels_have_none(load, views, make_labels):
    _, cache = make_labels(leave_out=6)
    assert (cache.labelled == 0).sum() == 6
    loader = load(tokens=TokenTargets("soft", GRID, m=2, residual="uniform"), cache=cache)
    for sample, (ids, weights) in tokens_of(loader, 0, views).items():
        if cache.labelled[sample]:
            np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
        else:
            assert (ids == -1).all()
            assert (weights == 0).all()


def test_images_are_the_same_with_and_without_targets(load, views, make_labels):
    _, cache = make_labels()
    with_targets = load(tokens=TokenTargets("gumbel", GRID), cache=cache)
    for a, b in zip(with_targets.epoch(1, views), load().epoch(1, views), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert a.token_ids.shape == (len(a), 12, 1)


def test_targets_that_cannot_be(load, views, make_labels, make_beton, tmp_path):
    _, cache = make_labels()
    targets = TokenTargets("gumbel", GRID)
    with pytest.raises(InputError, match="23 samples, .* has 9"):
        load(make_beton(tmp_path / "other.beton", 9), tokens=targets, cache=cache)
    loader = load(tokens=targets, cache=cache)
    for index in (np.ones(23, dtype=int), np.full(23, -1), np.zeros(22, dtype=int)):
        with pytest.raises(InputError, match="map_index"):
            loader.epoch(0, views, map_index=index)


def test_a_cache_of_wide_ids(load, views, make_labels):
    _, cache = make_labels()
    wide = replace(cache, class_ids=np.array(cache.class_ids, dtype=np.uint32))
    targets = TokenTargets("soft", GRID, m=3)
    narrow_tokens = tokens_of(load(tokens=targets, cache=cache), 0, views)
    for sample, pair in tokens_of(load(tokens=targets, cache=wide), 0, views).items():
        for mine, theirs in zip(pair, narrow_tokens[sample], strict=True):
            np.testing.assert_array_equal(mine, theirs)
