"""Several token caches in one loader: each sample's targets are those that its own cache alone would give."""

from dataclasses import replace

import numpy as np
import pytest

from stl_offline.errors import InputError
from stl_offline.targets import TokenTargets

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
