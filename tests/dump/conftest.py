"""Images, a labeler, and what an undisturbed dump by one process makes of them."""

import pytest

from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels
from tests.dump.dumping import content, make_work
from tests.labels.conftest import hub, s3, s3_server  # noqa: F401


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A dump's settings, without ``out``: 45 images in 15 shards."""
    return make_work(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="session")
def long_work(tmp_path_factory):
    """Settings of a dump that takes long enough to be disturbed: 300 images in 100 shards."""
    return make_work(tmp_path_factory.mktemp("long"), 100) | {"shards": 100}


@pytest.fixture(scope="session")
def long_undisturbed(long_work, tmp_path_factory):
    """What nothing disturbed makes of ``long_work``: files by name."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    # By this process: forks share the order of sets and dicts of strings with each other.
    dump_labels(DumpConfig(**long_work, out=str(out)))
    return content(out)
