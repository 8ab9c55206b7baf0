"""Which samples come when, and who gets them.

n: samples; B: batch size of one rank.
"""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stl_offline.distributed import World
from stl_offline.errors import InputError
from stl_offline.loader.order import check_shares, count_batches, rank_batches, shuffled


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 300))
def test_an_order_is_a_permutation_of_its_numbers_alone(seed, epoch, n):
    order = shuffled(seed, epoch, n)
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, shuffled(seed, epoch, n))


def test_orders_differ_by_seed_and_epoch():
    orders = {shuffled(seed, epoch, 50).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_an_order_never_changes():
    # A run that is resumed by a later release must go on with the batches that would have come.
    np.testing.assert_array_equal(shuffled(7, 3, 10), [5, 0, 2, 4, 7, 9, 1, 3, 6, 8])


def test_every_sample_comes_to_every_place():
    places = np.zeros((6, 6), dtype=int)
    for epoch in range(3000):
        places[shuffled(0, epoch, 6), np.arange(6)] += 1
    assert np.abs(places - 500).max() < 5 * np.sqrt(500)


@given(n=st.integers(1, 120), batch=st.integers(1, 12), world=st.integers(1, 5))
def test_ranks_share_every_sample_and_none_twice(n, batch, world):
    steps = count_batches(n, batch, world)
    assume(n >= steps * world)
    order = shuffled(1, 0, n)
    ranks = [rank_batches(order, batch, World(rank, world)) for rank in range(world)]
    assert {len(batches) for batches in ranks} == {steps}
    seen = [ids for batches in ranks for ids in batches]
    assert all(1 <= len(ids) <= batch for ids in seen)
    together = np.sort(np.concatenate(seen)) if seen else np.array([])
    assert len(np.unique(together)) == len(together)
    np.testing.assert_array_equal(together, np.arange(n))


@given(n=st.integers(1, 120), images=st.integers(1, 6), repeats=st.integers(2, 5), world=st.integers(1, 4))
def test_parts_of_an_order_have_as_many_batches_as_an_epoch_without_repeats(n, images, repeats, world):
    try:
        check_shares(n, images * repeats, world, repeats)
    except InputError:
        assume(False)
    steps = count_batches(n, images * repeats, world)
    parts = np.array_split(shuffled(1, 0, n), repeats)
    for part in parts:
        ranks = [rank_batches(part, images, World(rank, world), steps) for rank in range(world)]
        assert {len(batches) for batches in ranks} == {steps}
        assert all(1 <= len(ids) <= images for batches in ranks for ids in batches)
        seen = [ids for step in zip(*ranks, strict=True) for ids in step]
        np.testing.assert_array_equal(np.concatenate(seen), part)


@given(n=st.integers(8, 120), batch=st.integers(2, 12), world=st.integers(2, 4))
def test_ranks_together_see_what_one_rank_sees(n, batch, world):
    order = shuffled(1, 0, n)
    one = rank_batches(order, batch * world, World())
    assume(len(one[-1]) >= world)
    for step, ids in enumerate(one):
        parts = [rank_batches(order, batch, World(rank, world))[step] for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_too_few_samples_for_the_ranks():
    with pytest.raises(InputError, match="2 images .* 3 processes"):
        rank_batches(np.arange(2), 4, World(0, 3))
    with pytest.raises(InputError, match="use fewer processes"):
        rank_batches(np.arange(5), 1, World(0, 2))
