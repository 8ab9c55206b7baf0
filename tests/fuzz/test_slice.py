"""A slice of the fuzzing, short enough for every run of the tests (see run.py for the long form)."""

import pytest

from tests.fuzz.run import KINDS, attack
from tests.fuzz.work import TARGETS

CASES = 40
# On a machine of any speed. Every target refuses one of its first two.
LEAST = 8


@pytest.fixture(scope="module")
def results():
    # On a slow machine fewer cases, not a longer test: seconds for all targets, without making their files.
    return attack(list(TARGETS), 0, CASES, 20, LEAST)


@pytest.mark.parametrize("target", list(TARGETS))
def test_damage_ends_in_the_same_data_or_a_refusal(results, target):
    result = results[target]
    assert not result.faults
    assert result.counts["refused"] > 0
    assert set(result.counts) <= set(KINDS[:3])
