"""Epochs: every sample once, odd sizes, going on in the middle, several loaders, ends before the end."""

import contextlib
import gc
import importlib
import threading
import time

import numpy as np
import pytest
import torch

from stl_offline.distributed import World
from stl_offline.errors import InputError, TrainingError
from stl_offline.loader import iterator


def ids_of(batches):
    return [batch.sample_ids.tolist() for batch in batches]


def equal(first, second):
    """Whether two batches hold the same, bit for bit."""
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("images", "class_ids", "views", "sample_ids")
    )


def loading_threads():
    return [thread for thread in threading.enumerate() if thread.name == "stl-offline-loader"]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_every_sample_comes_once_with_its_class_and_view(load, beton, views, batch_size, workers):
    loader = load(batch_size=batch_size, workers=workers)
    batches = list(loader.epoch(0, views))
    assert len(batches) == len(loader) == -(-23 // batch_size)
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    ids = np.concatenate(ids_of(batches))
    np.testing.assert_array_equal(np.sort(ids), np.arange(23))
    for batch in batches:
        np.testing.assert_array_equal(batch.class_ids, beton.class_ids[batch.sample_ids.numpy()])
        np.testing.assert_array_equal(batch.views, views[batch.sample_ids.numpy()])
        assert batch.images.shape == (len(batch), 3, 20, 28)
        assert batch.token_ids is None
        assert batch.token_weights is None
        assert batch.class_ids.dtype == batch.sample_ids.dtype == torch.int64


def test_orders(load, views):
    loader = load()
    first, second, again = (ids_of(loader.epoch(epoch, views)) for epoch in (0, 1, 0))
    assert first == again != second
    assert ids_of(load(seed=4).epoch(0, views)) != first
    assert ids_of(load(shuffle=False).epoch(5, views)) == [list(range(at, min(at + 5, 23))) for at in range(0, 23, 5)]
    assert ids_of(load().epoch(0, views, sample_ids=np.array([7, 3, 22, 0, 11, 4]))) == [[7, 3, 22, 0, 11], [4]]
    assert list(load().epoch(0, views, sample_ids=np.array([], dtype=int))) == []


def test_batches_are_the_readers_own(load, views):
    kept = list(load(batch_size=2).epoch(0, views))
    assert len({batch.images.data_ptr() for batch in kept}) == len(kept)
    for batch, again in zip(kept, load(batch_size=2).epoch(0, views), strict=True):
        assert equal(batch, again)


@pytest.mark.parametrize("start", [0, 1, 4, 5])
@pytest.mark.parametrize("share", [{}, {"world": World(1, 2), "batch_size": 2}])
def test_going_on_in_the_middle_gives_the_batches_that_would_have_come(load, views, start, share):
    whole = list(load(**share).epoch(2, views))
    rest = list(load(workers=2, **share).epoch(2, views, start_batch=start))
    assert len(rest) == len(whole) - start
    assert all(equal(*pair) for pair in zip(rest, whole[start:], strict=True))


def test_two_loaders_at_the_same_time(load, views):
    alone = [ids_of(load(seed=seed, workers=2).epoch(0, views)) for seed in (1, 2)]
    loaders = [load(seed=seed, workers=2, batch_size=5) for seed in (1, 2)]
    for _ in range(3):
        pairs = zip(loaders[0].epoch(0, views), loaders[1].epoch(0, views), strict=True)
        together = [(a.sample_ids.tolist(), b.sample_ids.tolist()) for a, b in pairs]
        assert [list(part) for part in zip(*together, strict=True)] == alone


def test_a_new_epoch_ends_the_one_before(load, views):
    loader = load(batch_size=1)
    first = loader.epoch(0, views)
    next(first)
    second = loader.epoch(1, views)
    assert len(loading_threads()) == 1
    assert len(list(second)) == 23
    with pytest.raises(TrainingError, match="ended"):
        next(first)


def test_leaving_early_leaves_no_thread(load, views):
    with load(batch_size=1).epoch(0, views) as batches:
        next(batches)
        assert loading_threads()
    assert not loading_threads()
    with pytest.raises(StopIteration):
        next(batches)
    for _ in load(batch_size=1).epoch(0, views):
        break
    gc.collect()
    deadline = time.monotonic() + 10
    while loading_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not loading_threads()


def test_letting_an_epoch_go_waits_for_no_lock(load, views):
    """A signal that raises while a lock is taken leaves it taken; what runs at the interpreter's end must not wait."""
    epoch = load().epoch(0, views)
    thread = epoch._thread
    locks = [thread.output_queue.mutex, *(each._cond for each in vars(thread).values() if hasattr(each, "_cond"))]
    with contextlib.ExitStack() as held:
        for lock in locks:
            held.enter_context(lock)
        ends = threading.Timer(0, lambda: (epoch.__del__(), thread.__del__()))
        ends.daemon = True
        ends.start()
        ends.join(10)
        assert not ends.is_alive()
    assert thread.ended
    epoch.close()
    assert not thread.is_alive()


def test_an_epoch_ends_by_itself(load, views):
    batches = load().epoch(0, views)
    assert len(list(batches)) == 5
    assert list(batches) == []
    assert not loading_threads()


def test_torch_keeps_its_threads(load, views):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        for _ in load(workers=1).epoch(0, views):
            assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_more_workers_than_cores_are_as_many_as_cores(load, views):
    assert len(list(load(workers=500).epoch(0, views))) == 5


def test_ranks_see_disjoint_samples_and_together_all(load, views):
    one = ids_of(load(batch_size=6).epoch(1, views))
    ranks = [ids_of(load(batch_size=3, world=World(rank, 2)).epoch(1, views)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == one
    assert {len(load(batch_size=3, world=World(rank, 2))) for rank in (0, 1)} == {4}


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"batch_size": 0}, "batch size"),
        ({"image_size": (0, 4)}, "image size"),
        ({"workers": 0}, "worker"),
        ({"world": World(2, 2)}, "rank"),
        ({"std": (1, 0, 1)}, "std"),
    ],
)
def test_loaders_that_cannot_be(load, settings, reason):
    with pytest.raises(InputError, match=reason):
        load(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"start_batch": 6},
        {"start_batch": -1},
        {"sample_ids": np.array([23])},
        {"sample_ids": np.array([-1])},
        {"sample_ids": np.array([[1]])},
        {"map_index": np.zeros(23, dtype=int)},
    ],
)
def test_epochs_that_cannot_be(load, views, settings):
    with pytest.raises(InputError):
        load().epoch(0, views, **settings)


def test_memory_stays_where_it_is(load, views):
    loader = load(workers=2)

    def pages():
        gc.collect()
        with open("/proc/self/statm") as stream:
            return int(stream.read().split()[1])

    for epoch in range(15):
        list(loader.epoch(epoch, views))
    before = pages()
    for epoch in range(50):
        list(loader.epoch(epoch, views))
    assert pages() - before < 2000  # 8 MB; one epoch's images are 0.15 MB


@pytest.mark.parametrize("batches", [1, 3, 5])
def test_an_epoch_fills_no_buffer_that_is_still_copied_to_a_gpu(load, views, batches, monkeypatch):
    """Copies out of the last batches' buffers are only queued when an epoch ends; events tell when they are done."""
    events = []

    class Event:
        done = False

        def record(self, stream):
            assert stream == "the stream of cuda:1"
            events.append(self)

        def synchronize(self):
            self.done = True

    threads = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", "the stream of {}".format)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: threads.append((threading.get_ident(), str(device))))
    loader = load(batch_size=-(-23 // batches))
    loader.device = torch.device("cuda:1")  # `ToDevice` has been told that of this machine
    assert len(list(loader.epoch(0, views))) == batches and not events[-1].done
    before, real, filled = list(events), iterator.EpochThread.load, []

    def fill(self, number, ids, slot):
        filled.append(all(event.done for event in before))
        return real(self, number, ids, slot)

    monkeypatch.setattr(iterator.EpochThread, "load", fill)
    list(loader.epoch(1, views))
    assert filled == [True] * batches
    # Whatever thread speaks to CUDA speaks to the loader's GPU: the first one would get a context of each process.
    assert {device for _, device in threads} == {"cuda:1"} and threading.get_ident() not in dict(threads)


def test_a_loader_on_the_cpu_leaves_gpus_alone(load, views, monkeypatch):
    """Where torch sees a GPU, FFCV pins its buffers and makes streams for any loader."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self.shape) or self)
    theirs = importlib.import_module("ffcv.loader.epoch_iterator")
    assert torch.cuda.is_available() == theirs.IS_CUDA  # other FFCV loaders in the process need what it says
    monkeypatch.setattr(theirs, "IS_CUDA", True)
    loader = load(batch_size=5)
    assert len(list(loader.epoch(0, views))) == 5 and not pinned
