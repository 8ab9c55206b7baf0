"""Two real processes, as torchrun starts them, against one: who sees what, in which batch, under which stored view."""

import json

import pytest

from stl_offline.training import setup
from tests.forks import Fork
from tests.loader import rank_job
from tests.loader.conftest import SAMPLES
from tests.loader.rank_job import EPOCHS, NotedLoader, train

STORED_VIEWS = 2


@pytest.fixture(scope="module")
def labels(make_labels):
    """The place of a label set that holds two crops of each image."""
    return str(make_labels(maps=STORED_VIEWS, grid=(4, 4))[0].place)


@pytest.fixture(scope="module")
def one(beton, labels, tmp_path_factory):
    """What one process sees with the joint batch size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "TokenLoader", NotedLoader)
        return train(str(beton.path), labels, str(tmp_path_factory.mktemp("one") / "run"), 8)


def test_stored_views_are_shown_in_turn(one):
    assert len(one) == EPOCHS > 2 * STORED_VIEWS
    shown = [dict(sample for batch in epoch for sample in batch) for epoch in one]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in shown)
    for number, epoch in enumerate(shown):
        assert epoch == shown[number % STORED_VIEWS]
    assert not set(shown[0].values()) & set(shown[1].values())


def test_two_processes_share_the_samples_of_one(beton, labels, one, tmp_path):
    job = Fork(rank_job.__file__, beton.path, labels, tmp_path, processes=2)
    _, error = job.communicate(120)
    assert job.returncode == 0, error
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for number, expected in enumerate(one):
        mine, others = (ranks[rank][number] for rank in (0, 1))
        assert {sample for batch in mine for sample, _ in batch}.isdisjoint(
            sample for batch in others for sample, _ in batch
        )
        together = [[tuple(sample) for sample in a + b] for a, b in zip(mine, others, strict=True)]
        assert together == expected
