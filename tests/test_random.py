"""The counter-based generator against Random123's published numbers, and what its counters keep apart."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from stl_offline.random import STREAM_TOKEN, STREAM_VIEW, philox, philox_arrays, random_bits, uniforms, unit_interval

ONES = 0xFFFFFFFF


@njit
def call_philox(counter, key):
    return philox(counter[0], counter[1], counter[2], counter[3], key[0], key[1])


@njit
def call_bits(seed, stream, epoch, sample, draw):
    return random_bits(seed, stream, epoch, sample, draw)


@njit
def call_unit(bits):
    return unit_interval(bits)


# Random123, examples/kat_vectors, philox4x32 with 10 rounds.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter, key, expected):
    drawn = call_philox(np.array(counter, dtype=np.uint32), np.array(key, dtype=np.uint32))
    assert tuple(int(number) for number in drawn) == expected


@given(
    st.integers(0, 2**64 - 1),
    st.sampled_from([STREAM_VIEW, STREAM_TOKEN]),
    st.integers(0, 2**24 - 1),
    st.integers(0, 2**40 - 1),
    st.integers(0, 2**32 - 1),
)
def test_every_part_of_the_counter_matters(seed, stream, epoch, sample, draw):
    first = call_bits(np.uint64(seed), stream, np.uint64(epoch), np.uint64(sample), np.uint32(draw))
    again = call_bits(np.uint64(seed), stream, np.uint64(epoch), np.uint64(sample), np.uint32(draw))
    assert first == again
    others = [
        (seed ^ 1, stream, epoch, sample, draw),
        (seed ^ 2**63, stream, epoch, sample, draw),
        (seed, STREAM_VIEW + STREAM_TOKEN - stream, epoch, sample, draw),
        (seed, stream, epoch ^ 1, sample, draw),
        (seed, stream, epoch ^ 2**23, sample, draw),
        (seed, stream, epoch, sample ^ 1, draw),
        (seed, stream, epoch, sample ^ 2**39, draw),
        (seed, stream, epoch, sample, draw ^ 1),
    ]
    for a, b, c, d, e in others:
        assert call_bits(np.uint64(a), b, np.uint64(c), np.uint64(d), np.uint32(e)) != first


def test_unit_interval_is_half_open():
    assert call_unit(np.uint32(0)) == 0.0
    assert call_unit(np.uint32(2**31)) == 0.5
    assert call_unit(np.uint32(ONES)) == 1 - 2**-32


def test_draws_are_uniform():
    drawn = np.array([call_bits(np.uint64(7), STREAM_VIEW, np.uint64(0), np.uint64(i), 0) for i in range(4000)])
    for column in drawn.T:
        counts = np.bincount((column >> 28).astype(int), minlength=16)
        # Chi-squared with 15 degrees of freedom exceeds 37.7 once in a thousand; the seed is fixed.
        assert ((counts - 250) ** 2 / 250).sum() < 37.7
    correlations = np.corrcoef(drawn.T.astype(float)) - np.eye(4)
    assert abs(correlations).max() < 0.06


@pytest.mark.parametrize("count", [1, 4, 5])
def test_uniforms_of_many_samples_are_those_of_each(count):
    ids = np.array([3, 2**33, 0])
    numbers = uniforms(2**63 + 5, STREAM_TOKEN, 7, ids, count)
    assert numbers.shape == (3, count)
    for sample, row in zip(ids.tolist(), numbers, strict=True):
        drawn = [
            call_unit(np.uint32(bits))
            for draw in range(2)
            for bits in call_bits(np.uint64(2**63 + 5), STREAM_TOKEN, np.uint64(7), np.uint64(sample), np.uint32(draw))
        ]
        np.testing.assert_array_equal(row, drawn[:count])


def test_philox_of_arrays_is_philox():
    words = np.random.default_rng(0).integers(2**32, size=(6, 50), dtype=np.int64)
    expected = np.array([call_philox(column[:4].astype("u4"), column[4:].astype("u4")) for column in words.T]).T
    for kind in (np.asarray, torch.from_numpy):
        c0, c1, c2, c3, k0, k1 = map(kind, words)
        assert (np.stack([np.asarray(part) for part in philox_arrays((c0, c1, c2, c3), (k0, k1))]) == expected).all()
