"""Records in blocks: what is finished, what is left, and where a worker looks for a free shard."""

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stl_offline.labels.store import Records, open_storage, records

NAME = "labels-{:05d}-of-00047.zarr.zip.json"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_SHARDS", 10)
    return open_storage(tmp_path)


def make(here, done=(), *, first=0):
    found = Records(here, 47, "zarr", first=first)
    for index in done:
        here.write(found.path(index), b"{}")
    return found


def test_records_lie_in_the_folder_of_their_block(here):
    assert make(here, [3, 46]).path(46) == f".partial/records/00004/{NAME.format(46)}"
    assert here.names(".partial/records") == ["00000", "00004"]
    assert here.names(".partial/records/00004") == [NAME.format(46)]


@given(done=st.sets(st.integers(0, 46)), marked=st.sets(st.integers(0, 4)), first=st.integers(0, 46))
def test_what_is_done_and_what_is_left(done, marked, first):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "BLOCK_SHARDS", 10)
        here = open_storage(f"memory://{uuid.uuid4().hex}/labels")
        found = make(here, (index for index in done if index >= first), first=first)
        for block in marked:
            found.mark(block)
        there = {index for index in done if index >= first}
        assert found.all_recorded() == there
        # Five blocks are few, and are all listed.
        assert found.left() == [index for index in range(first, 47) if index not in there]
        assert [index for block in range(5) for index in found.shards(block)] == list(range(first, 47))


def test_of_many_blocks_some_are_listed(here, monkeypatch):
    monkeypatch.setattr(records, "_LISTED_BLOCKS", 2)
    found = make(here, [0, 11, 12, 25, 36])
    found.mark(0)
    # Blocks 1 and 2 are listed: 17 of 20 are left. So 8 of the 10 in block 3 are taken to be, and nothing of block 0.
    # Nobody has begun with block 4.
    assert found.left() == [10, *range(13, 25), *range(26, 30), *range(30, 38), *range(40, 47)]


def test_a_worker_looks_in_a_block_with_few_others(here):
    found = make(here, [21])
    assert found.pick_block([], is_shared=False) == 0
    found.mark(0)
    found.mark(4)
    assert found.pick_block([], is_shared=False) == 1
    assert {found.pick_block([12, 37, 38], is_shared=True) for _ in range(20)} == {2}
    assert {found.pick_block([12, 25, 37, 38], is_shared=True) for _ in range(100)} == {1, 2}
    for block in (1, 2, 3):
        found.mark(block)
    assert found.pick_block([12], is_shared=True) is None
    found.reopen([17, 19, 33])
    assert {found.pick_block([], is_shared=True) for _ in range(100)} == {1, 3}
