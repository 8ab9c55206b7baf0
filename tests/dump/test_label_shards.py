"""Labelling goes on from one shard to the next: what is stored, and what waits or fails, stays as shard by shard."""

import gc
import threading
import time
import weakref

import pytest
import torch

from stl_offline.config import DumpConfig
from stl_offline.dump import Labelling, dump_labels, load_labeler
from stl_offline.errors import FormatError, InputError
from stl_offline.images.beton import open_beton
from stl_offline.labels.format import encode_shard
from stl_offline.labels.store import open_storage
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.loader import TokenLoader
from tests.dump.dumping import content

SECONDS = 60


@pytest.fixture(params=[1, 2], ids=["one batch at a time", "two batches at a time"], autouse=True)
def at_once(request):
    """Batches that are labelled at the same time: by their threads, or started ahead as on a GPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(threads)


def make_labelling(work, **changes):
    config = DumpConfig(**work | {"out": "labels"} | changes)
    return Labelling(config, load_labeler(config), open_beton(config.data), torch.device("cpu"))


@pytest.fixture(scope="module")
def undisturbed(work, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    dump_labels(DumpConfig(**work, out=str(out)))
    return content(out)


@pytest.mark.parametrize("changes", [{}, {"crops_per_image": 3, "draws": 1}], ids=["whole images", "crops"])
def test_labels_are_those_of_each_shard_alone(work, tmp_path, changes):
    labelling = make_labelling(work, shards=7, batch_size=4, **changes)
    with LabelSetWriter(tmp_path / "set", labelling.spec, [1, 4, 8, 3, 13, 5, 11]) as writer:
        done = []
        found = list(labelling.label_shards(writer, iter([4, 0, None, None, 2, 6, None]), done.append))
        assert [None if each is None else each[0] for each in found] == [4, 0, None, None, 2, 6, None]
        assert sum(done) == (13 + 1 + 8 + 11) * len(labelling.views)
        for shard, arrays in filter(None, found):
            alone = labelling.label_shard(writer, shard, lambda count: None)
            assert encode_shard(arrays, labelling.spec) == encode_shard(alone, labelling.spec)


def test_the_next_shard_is_begun_before_one_is_done(work, tmp_path, monkeypatch):
    labelling = make_labelling(work, shards=5, batch_size=4)
    begun, real = [], labelling.loader.epoch
    monkeypatch.setattr(labelling.loader, "epoch", lambda *given, **more: begun.append(1) or real(*given, **more))
    with LabelSetWriter(tmp_path / "set", labelling.spec, 5) as writer:
        for number, _ in enumerate(labelling.label_shards(writer, range(5), lambda count: None)):
            assert len(begun) == min(number + 2, 5)


def run_together(*works):
    """What each of these functions gives; all run at the same time, and fail where one does not end."""
    found = {}
    threads = [
        threading.Thread(target=lambda place=place, work=work: found.update({place: work()}), daemon=True)
        for place, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "workers wait for each other"
    return [found[place] for place in range(len(works))]


def write_as_another(work, out, wait):
    """Hold shard 14 of 15 as another worker, and write it once ``wait(writer)`` returns."""
    labelling = make_labelling(work)
    with LabelSetWriter(out, labelling.spec, 15) as writer:
        claims = writer.claim_shards()
        assert next(claims) == 0
        assert writer._claims.take(14)
        writer._claims.release(0)
        wait(writer)
        writer.write_shard(14, labelling.label_shard(writer, 14, lambda count: None))


def test_shards_that_are_begun_are_written_before_a_worker_waits_for_another(work, undisturbed, tmp_path):
    """A worker that waits holds no shard back: the other one here writes its own only when all others are written."""
    out, is_held = tmp_path / "set", threading.Event()

    def wait(writer):
        is_held.set()
        deadline = time.monotonic() + SECONDS / 2
        while len(writer.unrecorded()) > 1:
            assert time.monotonic() < deadline, f"shards that nobody writes: {writer.unrecorded()}"
            time.sleep(0.01)

    def dump():
        assert is_held.wait(SECONDS)
        return dump_labels(DumpConfig(**work, out=str(out)))

    _, report = run_together(lambda: write_as_another(work, out, wait), dump)
    assert report.labelled == 42
    assert content(out) == undisturbed


@pytest.mark.parametrize("shards", [2, 15])
def test_two_workers_end(work, tmp_path, shards):
    changes = {"shards": shards, "batch_size": 4}
    dump_labels(DumpConfig(**work | changes, out=str(tmp_path / "alone")))
    config = DumpConfig(**work | changes, out=str(tmp_path / "set"))
    reports = run_together(*[lambda: dump_labels(config)] * 2)
    assert sum(report.labelled for report in reports) == 45
    assert content(tmp_path / "set") == content(tmp_path / "alone")


def fail_at(monkeypatch, kind, sample):
    """Make labelling fail at a sample: in its labels, in the labeler, or while it is loaded."""
    labels, label, check = Labelling._labels, Labelling._label_batch, TokenLoader._check_batch

    def not_finite(self, class_logits, token_logits, batch, view):
        wrong = (batch.sample_ids == sample).to(token_logits.dtype)[:, None, None]
        return labels(self, class_logits, token_logits / (1 - wrong), batch, view)

    def failing(self, batch, view):
        if sample in batch.sample_ids:
            raise InputError("no memory left")
        return label(self, batch, view)

    def damaged(self, ids):
        if sample in ids:
            raise FormatError("an image is damaged")
        return check(self, ids)

    if kind == "loader":
        monkeypatch.setattr(TokenLoader, "_check_batch", damaged)
    elif kind == "labeler":
        monkeypatch.setattr(Labelling, "_label_batch", failing)
    else:
        monkeypatch.setattr(Labelling, "_labels", not_finite)


@pytest.mark.parametrize("kind", ["labels", "labeler", "loader"])
def test_a_failure_costs_no_shard_that_comes_before(work, undisturbed, tmp_path, monkeypatch, kind):
    key = open_beton(work["data"]).keys[7]
    message = {"labels": f"1 of 2 images, the first is '{key}'", "labeler": "no memory left", "loader": "is damaged"}
    with monkeypatch.context() as patch, pytest.raises((InputError, FormatError), match=message[kind]):
        fail_at(patch, kind, 7)
        dump_labels(DumpConfig(**work, out=str(tmp_path / "set")))
    # The third of the shards, of three images each, failed.
    assert sorted(path.name[:12] for path in (tmp_path / "set").glob("labels-*")) == ["labels-00000", "labels-00001"]
    assert not open_storage(tmp_path / "set").names(".partial/claims")
    assert dump_labels(DumpConfig(**work, out=str(tmp_path / "set"))).labelled == 39
    assert content(tmp_path / "set") == undisturbed


@pytest.mark.parametrize("batch", [2, 9])
def test_an_interrupt_leaves_no_claim(work, undisturbed, tmp_path, monkeypatch, batch):
    """After the last batch of a shard, when the next shard is claimed, and between two batches of one."""
    calls, claimed = [], []

    def update(bar, count):
        calls.append(count)
        if len(calls) == batch:
            claimed.extend(open_storage(tmp_path / "set").names(".partial/claims"))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("tqdm.std.tqdm.update", update)
        dump_labels(DumpConfig(**work, out=str(tmp_path / "set")))
    assert {2: "00001-0", 9: "00004-0"}[batch] in claimed
    assert not open_storage(tmp_path / "set").names(".partial/claims")
    ours = ("labelling", "label set claims", "stl-offline-loader")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(ours)]
    dump_labels(DumpConfig(**work, out=str(tmp_path / "set")))
    assert content(tmp_path / "set") == undisturbed


def test_a_worker_that_waits_keeps_no_labels(work, tmp_path):
    """While others' shards are waited for, only who was given labels may hold them."""
    labelling, arrays = make_labelling(work, batch_size=2), []
    with LabelSetWriter(tmp_path / "set", labelling.spec, 15) as writer:
        given = labelling.label_shards(writer, iter([0, 1, None]), lambda count: None)
        for _ in range(2):
            arrays.append(weakref.ref(next(given)[1].logits))
        assert next(given) is None
        gc.collect()
        assert [each() for each in arrays] == [None, None]


def test_no_shards_give_no_labels(work, tmp_path):
    labelling = make_labelling(work)
    with LabelSetWriter(tmp_path / "set", labelling.spec, 15) as writer:
        assert list(labelling.label_shards(writer, iter([]), lambda count: None)) == []
