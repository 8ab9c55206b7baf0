"""``dump-labels`` in one process: what it says beforehand, and what a full disk does to it."""

import errno
import itertools
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import Labelling, dump_labels, estimate_dump, job, load_labeler
from stl_offline.dump.labelling import pick_shards
from stl_offline.errors import InputError, TargetError
from stl_offline.images.beton import open_beton
from stl_offline.images.pack import pack
from stl_offline.labels.format import encode_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.manifest import ShardRecord
from stl_offline.labels.store import FolderStorage
from stl_offline.labels.views_ahead import run_bytes
from stl_offline.labels.writer import LabelSetWriter
from tests.dump.dumping import SIDE, command, content


def dump(capsys, work, out, *more):
    """Exit code, standard output and standard error of the command."""
    code = main(command(work, out, 1, *more)[3:])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


class TestEstimate:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"format": "webdataset", "encoding": "f16", "crops_per_image": 3},
            {"shards": 1},
            {"draws": 2, "class_top_k": 2, "class_draws": 3},
        ],
    )
    def test_it_is_near_what_the_dump_takes_and_writes_nothing(self, work, tmp_path, changes):
        config = DumpConfig(**work | changes, out=str(tmp_path / "set"))
        estimate = estimate_dump(config)
        assert not (tmp_path / "set").exists()
        report = dump_labels(config)
        files = sum(len(data) for data in content(tmp_path / "set").values())
        # 45 images are all measured, so that only packing in other shards differs.
        assert estimate.bytes == pytest.approx(files, rel=0.03)
        assert (estimate.images, estimate.shards) == (report.samples, config.shards)
        assert estimate.views == max(1, config.crops_per_image)
        assert estimate.cache_bytes == run_bytes(open_label_set(config.out).spec, 45)
        assert estimate.fits and estimate.pack_seconds == 0
        assert 1 < estimate.images_per_second < 20_000
        assert estimate.seconds == pytest.approx(45 / estimate.images_per_second)

    def test_images_that_are_not_packed_stay_so(self, capsys, work, tmp_path, monkeypatch):
        monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
        folder = work["data"].removesuffix(".beton")
        code, out, _ = dump(capsys, work | {"data": folder}, tmp_path / "set", "--estimate", "--json")
        assert code == 0
        found = json.loads(out)
        assert found["images"] == found["measured"] == 45
        assert found["fits"] is True and found["free_bytes"] > 0 and found["pack_seconds"] > 0
        assert "is_first" not in found
        assert not list(tmp_path.iterdir())

    def test_in_words(self, capsys, work, tmp_path):
        code, out, _ = dump(capsys, work, tmp_path / "set", "--estimate")
        assert code == 0
        assert [line.partition(":")[0] for line in out.splitlines()] == [
            *("estimate", "size", "cache", "speed", "time", "workers", "disk")
        ]
        assert "45 images" in out and "15 shards" in out and "enough" in out

    def test_a_disk_that_is_too_small(self, work, tmp_path, monkeypatch):
        monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: 1000)
        assert not estimate_dump(DumpConfig(**work, out=str(tmp_path / "set"))).fits

    def test_the_whole_job_is_priced(self, work, tmp_path):
        found = estimate_dump(DumpConfig(**work, out="memory://priced/set"))
        one = found.seconds / 3600
        # 15 shards: eight workers do two each, at most; of 64 none does less than one.
        assert found.hours == pytest.approx({1: one, 8: one * 2 / 15, 64: one / 15})
        assert found.requests == 150 and found.read_bytes == 0 and found.free_bytes is None

    def test_what_the_dump_would_refuse(self, work, tmp_path):
        with pytest.raises(InputError, match="more than the 45 images"):
            estimate_dump(DumpConfig(**work | {"shards": 46}, out=str(tmp_path / "set")))


def test_a_full_disk_keeps_whole_shards(capsys, work, tmp_path, monkeypatch):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "set"
    assert dump(capsys, work, undisturbed)[0] == 0
    real = os.fsync

    def full(descriptor):
        if "00005-of" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, error = dump(capsys, work, out)
    assert code == 1
    assert len(error.splitlines()) == 1 and "No space left on device" in error
    assert len(list(out.glob("labels-*"))) == 5
    code, text, _ = dump(capsys, work, out, "--json")
    assert (code, json.loads(text)["labelled"]) == (0, 30)
    assert content(out) == content(undisturbed)


def test_ctrl_c_ends_cleanly_and_resumes(capsys, work, tmp_path, monkeypatch):
    calls = 0
    real = np.ascontiguousarray

    def interrupt(values, *arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(values, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("stl_offline.dump.labelling.np.ascontiguousarray", interrupt)
        code, _, error = dump(capsys, work, tmp_path / "set")
    assert code == 130
    assert error.strip() == "interrupted; run the same command again to go on"
    assert not list((tmp_path / "set").rglob(".*.tmp"))
    assert dump(capsys, work, tmp_path / "set")[0] == 0
    assert len(open_label_set(tmp_path / "set")) == 45


@pytest.mark.parametrize(
    ("samples", "shards"),
    [(1, 1), (512, 1), (1_023, 1), (2_400, 4), (4_096, 8), (32_768, 8), (32_769, 9), (1_281_167, 313)],
)
def test_a_number_of_shards_that_suits(samples, shards):
    assert pick_shards(samples, 0) == pick_shards(samples, 16) == shards


@pytest.mark.parametrize(("views", "images"), [(17, 3_855), (30, 2_184), (350, 187), (100_000, 1)])
def test_shards_of_many_crops_hold_fewer_images(views, images):
    assert pick_shards(1_281_167, views) == -(-1_281_167 // images)


def test_progress_tells_bytes_and_a_disk_that_will_not_do(monkeypatch, caplog):
    shown = []
    bar = SimpleNamespace(set_postfix_str=lambda text, refresh: shown.append(text))
    monkeypatch.setattr(FolderStorage, "free_bytes", lambda self: 12_000_000)
    size = job._Size("labels", 100, bar, per_image=True)
    for index in range(2):
        size.add(ShardRecord(f"labels-{index:05d}-of-00004.zarr.zip", 25 * index, 25, 5_000_000, "0" * 64))
    assert shown == ["5.0 of 20.0 MB", "10.0 of 20.0 MB"]
    (warned,) = caplog.messages
    assert "still to be written need 0.01 GB, but labels has 0.01 GB free" in warned


def test_a_labeler_of_few_classes_stores_all_of_them(work, tmp_path):
    """Five by default, but for labelers that have fewer; what is asked for by number is refused."""
    given = {name: value for name, value in work.items() if name != "top_k"}
    dump_labels(DumpConfig(**given, out=str(tmp_path / "set")))
    assert open_label_set(tmp_path / "set").spec.top_k == 3
    with pytest.raises(InputError, match="`top_k` is 5, but the labeler has only 3 classes"):
        dump_labels(DumpConfig(**given, top_k=5, out=str(tmp_path / "other")))


def test_images_shrunk_otherwise_are_other_images(work, tmp_path):
    """A .beton's fingerprint is that of its source: packed again with other sizes, it stays the same."""
    data = tmp_path / "images.beton"
    config = DumpConfig(**work | {"data": str(data)}, out=str(tmp_path / "set"))
    pack(Path(work["data"]).with_suffix(""), data, max_size=SIDE // 2)
    dump_labels(config)
    assert dump_labels(config).labelled == 0
    data.unlink()
    pack(Path(work["data"]).with_suffix(""), data)
    with pytest.raises(TargetError, match=f"creation.max_size is null and {SIDE // 2}"):
        dump_labels(config)


def test_finish_writes_the_manifest_of_shards_that_are_there(capsys, work, tmp_path):
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "set"
    assert dump(capsys, work, undisturbed, "--worker")[0] == 0
    code, _, error = dump(capsys, work, out, "--finish")
    assert code == 1 and "no job has begun in" in error and not out.exists()
    config = DumpConfig(**work, out="")
    labelling = Labelling(config, load_labeler(config), open_beton(work["data"]), torch.device("cpu"))
    with LabelSetWriter(out, labelling.spec, 15) as writer:
        code, _, error = dump(capsys, work, out, "--finish")
        assert code == 1 and "15 of 15 shards" in error and "leave it out to go on" in error
        for shard in range(15):
            writer.write_encoded(shard, (undisturbed / writer.shard_name(shard)).read_bytes())
    code, _, error = dump(capsys, work | {"top_k": 1}, out, "--finish")
    assert code == 1 and "top_k is 1 and 2" in error
    code, text, _ = dump(capsys, work, out, "--finish", "--json")
    assert (code, json.loads(text)["labelled"]) == (0, 0)
    assert content(out) == content(undisturbed)
    assert dump(capsys, work, out, "--finish", "--estimate")[0] == 2


class TestBatchesAtOnce:
    @pytest.fixture
    def labelling(self, work):
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        config = DumpConfig(**work | {"batch_size": 4}, out="")
        yield Labelling(config, load_labeler(config), open_beton(work["data"]), torch.device("cpu"))
        torch.set_num_threads(threads)

    def test_labels_and_threads_stay_as_they_are(self, labelling, monkeypatch):
        samples, seen, forward = np.arange(30), set(), labelling.labeler.forward

        def note(images):
            seen.add((threading.current_thread().name.partition("_")[0], torch.get_num_threads()))
            return forward(images)

        monkeypatch.setattr(labelling.labeler, "forward", note)
        done = []
        ours = labelling.label(samples, done.append)
        assert seen == {("labelling", 1)} and done == [4] * 7 + [2] and torch.get_num_threads() == 2
        torch.set_num_threads(1)
        theirs = labelling.label(samples, lambda count: None)
        assert encode_shard(ours, labelling.spec) == encode_shard(theirs, labelling.spec)

    def test_a_failure_ends_them(self, labelling, monkeypatch):
        forward, numbers, calls = labelling.labeler.forward, itertools.count(1), []

        def fail(images):
            number = next(numbers)  # of this call alone: another thread may call at the same time
            calls.append(number)
            logits = forward(images)
            return logits if number != 2 else (logits[0], logits[1] * float("nan"))

        monkeypatch.setattr(labelling.labeler, "forward", fail)
        with pytest.raises(InputError, match="not finite"):
            labelling.label(np.arange(45), lambda count: None)
        assert len(calls) <= 5 and torch.get_num_threads() == 2
