"""Several token caches in one loader: each sample's targets are those that its own cache alone would give."""

from dataclasses import replace

import numpy as np
import pytest

from stl_offline.errors import InputError
from stl_offline.targets import TokenTargets
from tests.loader.test_tokens import CLASSES

TARGETS = TokenTargets("soft", (4, 3), m=3)


def targets_of(loader, views, **settings):
    """{sample: (ids, weights)} of epoch 2."""
    found = {}
    for batch in loader.epoch(2, views, **settings):
        rows = zip(batch.token_ids.numpy(), batch.token_weights.numpy(), strict=True)
        found |= dict(zip(batch.sample_ids.tolist(), rows, strict=True))
    return found


@pytest.fixture(scope="module")
def caches(make_labels):
    """Of another grid, k and number of maps each; the second lacks six images."""
    return make_labels(grid=(5, 6))[1], make_labels(grid=(3, 8), top_k=2, maps=3, leave_out=6)[1]


@pytest.mark.parametrize("kind", ["soft", "gumbel"])
def test_each_sample_reads_its_own_cache(load, views, caches, kind):
    targets = replace(TARGETS, kind=kind)
    index = np.arange(len(views)) % 2
    maps = np.where(index == 1, np.arange(len(views)) % 3, 0)
    found = targets_of(load(tokens=targets, cache=caches), views, cache_index=index, map_index=maps)
    alone = [
        targets_of(load(tokens=targets, cache=cache), views, map_index=maps * (number == 1))
        for number, cache in enumerate(caches)
    ]
    assert len(found) == len(views)
    for sample, pair in found.items():
        for mine, expected in zip(pair, alone[index[sample]][sample], strict=True):
            np.testing.assert_array_equal(mine, expected)
    assert any((alone[0][sample][0] != alone[1][sample][0]).any() for sample in found)


def test_draws_beside_a_top_k(load, views, caches, make_labels):
    """A residual is of the sets that leave one: the draws leave none."""
    drawn = make_labels(top_k=0, draws=3, has_confidence=False)[1]
    index = np.arange(len(views)) % 2
    for kind, residual, ids in (("soft", "uniform", CLASSES + 1), ("gumbel", "class", 1), ("gumbel", "ghost", 4)):
        targets = TokenTargets(kind, (4, 3), m=CLASSES, residual=residual)
        found = targets_of(load(tokens=targets, cache=(caches[1], drawn)), views, cache_index=index)
        alone = [
            targets_of(load(tokens=replace(targets, **each), cache=cache), views)
            for cache, each in ((caches[1], {}), (drawn, {"residual": "ignore"}))
        ]
        for sample, (token_ids, weights) in found.items():
            assert token_ids.shape == (12, ids)
            of = alone[index[sample]][sample]
            width = of[0].shape[1]
            np.testing.assert_array_equal(token_ids[:, :width], of[0])
            np.testing.assert_array_equal(weights[:, :width], of[1])
            np.testing.assert_allclose(weights[:, width:], 0, atol=1e-5)


def test_choices_that_cannot_be(load, views, caches):
    loader = load(tokens=TARGETS, cache=caches)
    for index in (np.full(len(views), 2), np.full(len(views), -1), np.zeros(3, dtype=int)):
        with pytest.raises(InputError, match="cache_index"):
            loader.epoch(0, views, cache_index=index)
    with pytest.raises(InputError, match=r"does not hold; they hold \[1, 3\]"):
        loader.epoch(0, views, map_index=np.ones(len(views), dtype=int))
    with pytest.raises(InputError, match="without token targets"):
        load().epoch(0, views, cache_index=np.zeros(len(views), dtype=int))
    with pytest.raises(InputError, match="at least one token cache"):
        load(tokens=TARGETS, cache=())
