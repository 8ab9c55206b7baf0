"""Token targets from labels with draws: those that plain numpy makes of the label set, and the softmax in distribution.

N: tokens of the student; K: classes; S: draws of a token.
"""

import numpy as np
import pytest
import torch

from stl_offline.dump.drawing import DrawKey, draw_classes
from stl_offline.errors import InputError
from stl_offline.geometry import View, relative_view
from stl_offline.labels.draws import bits_of, entries, expand_into, frequencies, pack_draws
from stl_offline.random import STREAM_DRAW
from stl_offline.targets import TokenTargets, token_targets
from tests.loader.conftest import CLASS_NAMES, random_views
from tests.loader.test_tokens import GRID, tokens_of
from tests.targets import by_hand

CLASSES = len(CLASS_NAMES)
KINDS = {
    "one draw": {"top_k": 0, "draws": 1, "has_confidence": False},
    "draws": {"top_k": 0, "draws": 5},
    "hybrid": {"top_k": 2, "draws": 3, "encoding": "q8"},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# χ² with 36 degrees of freedom exceeds this once in 30,000 times; the draws are the same each time.
LIMIT_OF_36 = 80.4


@pytest.mark.parametrize("classes", [2, 7, 256, 1000, 70_000])
def test_packed_draws_come_back(classes):
    draws = np.random.default_rng(0).integers(classes, size=(3, 3, 5, 4)).astype("<u4")
    packed = pack_draws(draws, classes)
    none = np.empty((3, 5, 0), "<u4"), np.empty((3, 5, 0), np.float32)
    for row in range(3):
        ids, masses = np.empty((3, 5, 4), "<u4"), np.empty((3, 5, 4), np.float32)
        expand_into(*none, packed[row], bits_of(classes), False, ids, masses)
        assert (ids == draws[row]).all() and np.allclose(masses, 0.25, atol=2e-6)
    assert packed.shape[1] <= -(-60 * bits_of(classes) // 8) + 3


def test_a_token_cache_takes_at_most_400_bytes_a_map(make_labels):
    draws = np.random.default_rng(0).integers(1000, size=(1, 14, 14, 1)).astype("<u2")
    assert pack_draws(draws, 1000).nbytes + 24 + 1 <= 400  # with its view and whether there is one


@every_kind
def test_a_cache_holds_what_the_set_holds(beton, make_labels, kind):
    label_set, cache = make_labels(**kind, class_top_k=2, class_draws=3)
    for sample, key in enumerate(beton.keys):
        stored = label_set[key]
        ids, masses = cache.entries(sample)
        assert (ids == stored.entries()[0][0]).all()
        np.testing.assert_allclose(masses, stored.entries()[1][0], atol=2e-6)
        assert (cache.head_ids[sample, 0] == np.concatenate([stored.head_ids[0], stored.head_draws[0]])).all()
        assert abs(cache.head_masses[sample, 0].sum() - 1) < 1e-3
    assert (cache.confidence is None) == (not label_set.spec.has_confidence)


@every_kind
@pytest.mark.parametrize("workers", [1, 2])
def test_drawn_targets_are_those_made_by_hand(load, beton, make_labels, kind, workers):
    label_set, cache = make_labels(**kind)
    loader = load(tokens=TokenTargets("gumbel", GRID), cache=cache, workers=workers, seed=11, batch_size=4)
    views = random_views(beton, 1)
    for sample, (ids, weights) in tokens_of(loader, 1, views).items():
        class_ids, masses = (part[0] for part in label_set[beton.keys[sample]].entries())
        masses = masses.copy()
        masses[..., -1] += 1e-6
        matrix = relative_view(View.identity(), View.from_array(views[sample])).matrix
        expected = by_hand.drawn(class_ids, masses, matrix, GRID, 2, "ignore", CLASSES, 11, 1, sample)
        np.testing.assert_array_equal(ids[:, 0], expected[0])
        np.testing.assert_array_equal(weights[:, 0], expected[1])


@every_kind
@pytest.mark.parametrize("target", ["soft", "argmax"])
def test_mixtures_are_those_made_by_hand(load, beton, make_labels, kind, target):
    label_set, cache = make_labels(**kind)
    loader = load(tokens=TokenTargets(target, GRID, m=CLASSES), cache=cache)
    views = random_views(beton, 3)
    for sample, (ids, weights) in tokens_of(loader, 3, views).items():
        matrix = relative_view(View.identity(), View.from_array(views[sample])).matrix
        dense, covered = by_hand.aligned(label_set[beton.keys[sample]].dense()[0], matrix, GRID, 2)
        dense = dense.reshape(-1, CLASSES)
        if target == "soft":
            full = np.zeros((len(ids), CLASSES + 1))
            np.add.at(full, (np.arange(len(ids))[:, None], ids), weights)
            np.testing.assert_allclose(full[:, :CLASSES], dense, atol=2e-6)
        else:
            best = dense[np.arange(len(ids)), ids[:, 0]]
            np.testing.assert_allclose(best, dense.max(-1), atol=2e-6)
            np.testing.assert_allclose(weights[:, 0], covered.ravel(), atol=2e-6)


@pytest.mark.parametrize("target", ["soft", "argmax"])
def test_under_its_own_view_a_map_with_repeated_draws_is_itself(load, beton, make_labels, target):
    label_set, cache = make_labels(top_k=0, draws=6)
    targets = TokenTargets(target, cache.grid, m=6)
    views = np.tile(np.array([1, 0, 0, 0, 1, 0], np.float32), (len(beton), 1))
    for sample, (ids, weights) in tokens_of(load(tokens=targets, cache=cache), 0, views).items():
        listed, masses = frequencies(*(part[0] for part in label_set[beton.keys[sample]].entries()))
        masses = masses.reshape(len(ids), -1)
        if target == "soft":
            np.testing.assert_allclose(weights, masses, atol=1e-6)
        first = listed.reshape(len(ids), -1)[:, 0]
        assert (ids[:, 0] == first)[masses[:, 0] > masses[:, 1] + 1e-4].all()


def test_what_needs_what_the_labels_lack_says_so(load, make_labels):
    cache = make_labels(top_k=0, draws=1, has_confidence=False)[1]
    with pytest.raises(InputError, match="`min_confidence` needs labels with a confidence"):
        load(tokens=TokenTargets("gumbel", GRID, min_confidence=0.3), cache=cache)
    with pytest.raises(InputError, match="`residual` does nothing for labels with draws"):
        load(tokens=TokenTargets("gumbel", GRID, residual="uniform"), cache=cache)


@pytest.mark.parametrize(("kept", "draws"), [(0, 1), (0, 3), (2, 1)], ids=["one draw", "draws", "hybrid"])
@pytest.mark.parametrize("crop", [pytest.param(None, marks=pytest.mark.slow), (0.5, 0, 0.2, 0, 0.6, 0.1)])
def test_targets_are_drawn_from_the_whole_softmax(kept, draws, crop):
    """Stored draws, read by "gumbel", against the mixture of full softmaxes that an online labeler would draw from.

    A million targets of whole maps, and a sixth of that of crops.
    """
    grid, classes = (2, 3), 7
    images = 1_000_000 // 6 // (6 if crop else 1)
    logits = torch.randn(1, 6, classes, generator=torch.Generator().manual_seed(1)) * 2
    whole = torch.softmax(logits.double(), -1).numpy().reshape(*grid, classes)
    best, ids = torch.softmax(logits, -1).topk(kept, dim=-1)
    hashes = np.random.default_rng(2).integers(2**64, size=images, dtype=np.uint64)
    drawn = draw_classes(
        logits.expand(images, -1, -1), draws, DrawKey(3, STREAM_DRAW, hashes, 0), ids.expand(images, -1, -1)
    ).numpy()
    view = np.eye(2, 3) if crop is None else np.reshape(crop, (2, 3))
    targets = TokenTargets("gumbel", grid)
    counts = np.zeros((6, classes))
    stored, masses = ids[0].numpy().astype("<u2"), best[0].numpy()
    for image in range(images):
        found = entries(stored, masses, drawn[image].astype("<u2"))
        class_ids, probabilities = (part.reshape(*grid, -1) for part in found)
        probabilities[..., -1] += 1e-6
        labels = (class_ids, probabilities, probabilities[..., 0])
        out, _ = token_targets(targets, *labels, view, classes, seed=5, epoch=0, sample_id=image)
        counts[np.arange(6), out[:, 0]] += 1
    expected = by_hand.aligned(whole, view, grid, 2)[0].reshape(6, classes) * images
    assert (counts.sum(-1) == images).all()
    assert ((counts - expected) ** 2 / expected).sum() < LIMIT_OF_36
