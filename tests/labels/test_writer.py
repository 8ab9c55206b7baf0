"""The writer: resumes, refuses, and gives the same bytes whatever happened before."""

import errno
import json
import os
import resource
import signal
from functools import partial

import numpy as np
import pytest

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import sha256_bytes
from stl_offline.labels.format import containers
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files, fork, kill_at_step, run, wait, write_all
from tests.labels.synthetic import make_arrays, make_spec, write_set

SPEC = make_spec(samples=13)
SHARDS = 3


@pytest.fixture(scope="module")
def encoded():
    ranges = [(index * 13 // SHARDS, (index + 1) * 13 // SHARDS) for index in range(SHARDS)]
    return [containers.encode_shard(make_arrays(SPEC, *each), SPEC) for each in ranges]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, encoded):
    path = tmp_path_factory.mktemp("undisturbed") / "labels"
    write_set(path, SPEC, SHARDS)
    assert [data for name, data in files(path).items() if name.startswith("labels-")] == encoded
    return files(path)


def test_only_the_manifest_and_the_shards_remain(undisturbed):
    shards = [f"labels-{index:05d}-of-00003.zarr.zip" for index in range(SHARDS)]
    assert {name for name in undisturbed if name != "README.md"} == {"manifest.json", *shards}
    manifest = json.loads(undisturbed["manifest.json"])
    for shard in manifest["shards"]:
        data = undisturbed[shard["name"]]
        assert (shard["bytes"], shard["sha256"]) == (len(data), sha256_bytes(data))
    assert [shard["samples"] for shard in manifest["shards"]] == [4, 4, 5]


def test_goes_on_where_it_stopped(tmp_path, undisturbed):
    path = tmp_path / "labels"
    with LabelSetWriter(path, SPEC, SHARDS) as writer:
        assert writer.todo() == [0, 1, 2] and not writer.complete
        writer.write_shard(1, make_arrays(SPEC, *writer.shard_range(1)))
        assert writer.is_done(1) and writer.todo() == writer.missing() == [0, 2]
        assert writer.todo(0, 2) == [0, 2] and writer.todo(1, 2) == []
        with pytest.raises(TargetError, match="2 of 3 shards .* the first is 0; run the same command again"):
            writer.finish()
    with pytest.raises(FormatError, match="not finished: 1 of 3 shards are done; run the command"):
        open_label_set(path)
    before = (path / "labels-00001-of-00003.zarr.zip").stat().st_ino
    write_set(path, SPEC, SHARDS)
    assert files(path) == undisturbed
    assert (path / "labels-00001-of-00003.zarr.zip").stat().st_ino == before, "a shard that was done is left alone"


def test_a_complete_set_is_left_alone(tmp_path, undisturbed):
    write_set(tmp_path, SPEC, SHARDS)
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        assert writer.complete and writer.todo() == writer.missing() == []
        assert len(writer.finish().shards) == SHARDS
        with pytest.raises(TargetError, match="complete"):
            writer.write_shard(0, make_arrays(SPEC, 0, 4))
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_before_every_single_step(tmp_path, encoded, undisturbed, every):
    """SIGKILL before each (or each fifth) call that changes the folder; then again: it must end in the same bytes."""
    survived = 0
    for step in range(0, 1000, every):
        path = tmp_path / f"at {step}"
        code = kill_at_step(step, partial(write_all, path, SPEC, encoded))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if path.exists():
            try:
                # Whatever the moment, a reader sees a whole label set or an error, never a part of one.
                assert len(open_label_set(path).read_shard(2)) == 5
            except FormatError:
                assert not (path / "manifest.json").exists()
        # Again, killed at some other moment; then to the end.
        kill_at_step(step // 2, partial(write_all, path, SPEC, encoded))
        assert run(partial(write_all, path, SPEC, encoded)) == 0
        assert files(path) == undisturbed
        survived += 1
    assert survived > 40 // every
    assert files(path) == undisturbed


def test_a_shard_without_its_record_does_not_exist(tmp_path, encoded, undisturbed):
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        for index in range(SHARDS):
            writer.write_encoded(index, encoded[index])
        (tmp_path / ".partial" / "records" / "00000" / "labels-00002-of-00003.zarr.zip.json").unlink()
        assert writer.todo() == [2]
    write_set(tmp_path, SPEC, SHARDS)
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize("recorded", [True, False])
def test_a_shard_that_is_there_with_other_bytes_is_named(tmp_path, encoded, undisturbed, recorded):
    name = "labels-00002-of-00003.zarr.zip"
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        writer.write_encoded(2, encoded[2][:-1])
    if not recorded:
        (tmp_path / ".partial" / "records" / "00000" / f"{name}.json").unlink()
    before = files(tmp_path)
    ours, theirs = sha256_bytes(encoded[2]), sha256_bytes(encoded[2][:-1])
    with (
        LabelSetWriter(tmp_path, SPEC, SHARDS) as writer,
        pytest.raises(TargetError, match=f"{name} .* SHA-256 is {theirs}, that of the shard just made {ours}"),
    ):
        writer.write_encoded(2, encoded[2])
    assert files(tmp_path) == before
    # What the message advises.
    (tmp_path / name).unlink()
    (tmp_path / ".partial" / "records" / "00000" / f"{name}.json").unlink(missing_ok=True)
    write_set(tmp_path, SPEC, SHARDS)
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "labels-00001-of-00003.zarr.zip").write_bytes(b"cut"),
        lambda path: (path / "labels-00001-of-00003.zarr.zip").unlink(),
        lambda path: (path / ".partial/records/00000/labels-00001-of-00003.zarr.zip.json").write_bytes(b"{"),
        lambda path: (path / ".partial/records/00000/labels-00001-of-00003.zarr.zip.json").write_bytes(b'{"name": 3}'),
    ],
)
def test_a_shard_that_is_not_as_recorded_is_written_again(tmp_path, encoded, undisturbed, damage):
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        writer.write_encoded(1, encoded[1])
    damage(tmp_path)
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        assert writer.todo() == [0, 1, 2]
    write_set(tmp_path, SPEC, SHARDS)
    assert files(tmp_path) == undisturbed


def test_leftovers_of_a_killed_job_are_removed(tmp_path, undisturbed):
    with LabelSetWriter(tmp_path, SPEC, SHARDS):
        (tmp_path / ".labels-00001-of-00003.zarr.zip.123.abcd.tmp").write_bytes(b"half")
    write_set(tmp_path, SPEC, SHARDS)
    assert files(tmp_path) == undisturbed


def test_other_settings_are_refused_by_name(tmp_path):
    for path, finish in ((tmp_path / "whole", True), (tmp_path / "partial", False)):
        with LabelSetWriter(path, SPEC, SHARDS) as writer:
            if finish:
                for index in writer.todo():
                    writer.write_shard(index, make_arrays(SPEC, *writer.shard_range(index)))
                writer.finish()
        before = files(path)
        for spec, shards, words in (
            (make_spec(samples=13, top_k=3), SHARDS, "top_k is 3 and 4"),
            (make_spec(samples=13, creation={"seed": 4}), SHARDS, "creation.seed is 4 and 3"),
            (SPEC, 4, "shards is 4 and 3"),
        ):
            with pytest.raises(TargetError, match=words), LabelSetWriter(path, spec, shards):
                pass
        assert files(path) == before


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(TargetError, match=r"holds no label set \(thesis.txt lies there\)"),
        LabelSetWriter(tmp_path, SPEC, SHARDS),
    ):
        pass
    assert files(tmp_path) == {"thesis.txt": b"years of work"}
    (tmp_path / "manifest.json").write_text("{}")
    with (
        pytest.raises(FormatError, match="manifest.json: this is not a label set"),
        LabelSetWriter(tmp_path, SPEC, SHARDS),
    ):
        pass


def test_a_complete_set_that_lost_a_shard_is_not_called_complete(tmp_path):
    write_set(tmp_path, SPEC, SHARDS)
    (tmp_path / "labels-00001-of-00003.zarr.zip").unlink()
    with (
        pytest.raises(TargetError, match=r"lacks 1 whole shard, the first is .*; copy them again, or remove"),
        LabelSetWriter(tmp_path, SPEC, SHARDS),
    ):
        pass
    # One that was pulled in part is not damaged.
    (tmp_path / "partial.json").write_text('{"shards": "0,2"}')
    with (
        pytest.raises(TargetError, match=r"shard, .*; pull the rest"),
        LabelSetWriter(tmp_path, SPEC, SHARDS),
    ):
        pass


def test_two_writers_of_one_set_write_the_same(tmp_path, encoded, undisturbed):
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as first, LabelSetWriter(tmp_path, SPEC, SHARDS) as second:
        for index in range(SHARDS):
            first.write_encoded(index, encoded[index])
            written = (tmp_path / first.shard_name(index)).stat().st_ino
            second.write_encoded(index, encoded[index])
            assert (tmp_path / first.shard_name(index)).stat().st_ino == written
        assert first.finish() == second.finish()
    assert files(tmp_path) == undisturbed


def test_processes_share_the_work(tmp_path, encoded, undisturbed):
    for processes in (2, 5):
        path = tmp_path / str(processes)
        children = [fork(partial(write_all, path, SPEC, encoded)) for _ in range(processes)]
        assert [wait(child) for child in children] == [0] * processes
        assert files(path) == undisturbed


def test_shards_that_do_not_fit_are_refused(tmp_path):
    for count in (0, 14):
        with pytest.raises(InputError, match="between 1 and the 13 samples"):
            LabelSetWriter(tmp_path, SPEC, count)
    with (
        LabelSetWriter(tmp_path, SPEC, SHARDS) as writer,
        pytest.raises(FormatError, match="shard 2 holds samples 8 to"),
    ):
        writer.write_shard(2, make_arrays(SPEC, 0, 4))


# A target that cannot be written.


def test_a_full_disk_keeps_whole_shards(tmp_path, monkeypatch, encoded, undisturbed):
    real = os.fsync

    def full(descriptor):
        if "00001" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        writer.write_encoded(0, encoded[0])
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(TargetError, match=r"cannot write .*00001-of-00003.zarr.zip: No space left on device"):
            writer.write_encoded(1, encoded[1])
        monkeypatch.undo()
        assert writer.todo() == [1, 2]
        assert not list(tmp_path.glob(".*.tmp"))
    write_set(tmp_path, SPEC, SHARDS)
    assert files(tmp_path) == undisturbed


def test_a_file_size_limit_keeps_whole_shards(tmp_path, undisturbed):
    """The kernel refuses in the middle of a write, as it does on a full disk."""
    spec = make_spec(samples=40, grid=(14, 14))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        data = [bytes(2000), bytes(900_000)]
        with LabelSetWriter(tmp_path, spec, 2) as writer:
            writer.write_encoded(0, data[0])
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
            try:
                writer.write_encoded(1, data[1])
            except TargetError as error:
                assert "File too large" in str(error)
            else:
                raise AssertionError("the kernel took what it must not")

    assert run(limited) == 0
    with LabelSetWriter(tmp_path, spec, 2) as writer:
        assert writer.todo() == [1]
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("place", ["file/labels", "/proc/labels"])
def test_a_target_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(TargetError, match="cannot make the folder"), LabelSetWriter(tmp_path / place, SPEC, SHARDS):
        pass
    assert files(tmp_path) == {"file": b"a file, not a folder"}


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    real = os.open

    def read_only(path, flags, *arguments, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(TargetError, match="Read-only file system"), LabelSetWriter(tmp_path, SPEC, SHARDS):
        pass


def test_bytes_depend_on_nothing_but_the_input(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "another name" / "deeper", SPEC, SHARDS)
    assert files(tmp_path / "another name" / "deeper") == undisturbed
    assert np.array_equal(open_label_set(tmp_path / "another name" / "deeper").shards[0].first, 0)
