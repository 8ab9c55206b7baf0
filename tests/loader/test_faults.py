"""Damage and death: an error that names the sample within seconds; never a hang, never stale pixels."""

import dataclasses
import os
import threading
import time

import numpy as np
import pytest

from stl_offline.errors import FormatError, TrainingError
from stl_offline.geometry import whole_views
from stl_offline.loader import iterator
from stl_offline.loader.iterator import EpochThread


@pytest.fixture
def own(make_beton, tmp_path):
    """A .beton that may be damaged."""
    return make_beton(tmp_path / "own.beton")


def overwrite(beton, sample, offset, data):
    with open(beton.path, "r+b") as stream:
        stream.seek(int(beton.pointers[sample]) + offset)
        stream.write(data)


def cut_entropy_data(beton, sample):
    """An end mark in the middle: what a cut-off download looks like."""
    overwrite(beton, sample, int(beton.sizes[sample]) * 2 // 3, b"\xff\xd9" * 40)


def scramble_entropy_data(beton, sample):
    overwrite(beton, sample, int(beton.sizes[sample]) // 2, np.random.default_rng(0).bytes(100))


def erase_the_head(beton, sample):
    overwrite(beton, sample, 0, bytes(64))


def claim_another_size(beton, sample):
    """The bytes of another, smaller image: rows that are not there must not be filled from elsewhere."""
    smaller = 10  # the same stripes, 24 rows instead of 59 or so
    data = beton.stored_bytes(smaller)
    assert beton.heights[smaller] < beton.heights[sample]
    overwrite(beton, sample, 0, data[: int(beton.sizes[sample])])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("damage", [cut_entropy_data, scramble_entropy_data, erase_the_head, claim_another_size])
def test_a_damaged_image_is_named_in_its_batch(load, own, damage, workers):
    sample = 14
    assert not own.raw[sample]
    damage(own, sample)
    loader = load(own, shuffle=False, workers=workers)
    seen = []
    with pytest.raises(FormatError, match="the image 'folder/image 014' is damaged: its bytes changed since packing"):
        for batch in loader.epoch(0, whole_views(len(own))):
            seen += batch.sample_ids.tolist()
    assert seen == list(range(10))
    # The loader is of use afterwards, and the damage is found again.
    assert len(list(loader.epoch(0, whole_views(len(own)), sample_ids=np.arange(5)))) == 1
    with pytest.raises(FormatError, match="image 014"):
        list(loader.epoch(1, whole_views(len(own))))


def test_damage_below_a_crop_is_found(load, own):
    # Sound JPEGs are read no further than a crop needs: whether they are sound, their bytes say, not their name.
    sample = 14
    own_bytes = own.stored_bytes(sample)
    overwrite(own, sample, len(own_bytes) - 60, bytes(range(58)))
    views = whole_views(len(own))
    views[:, 4] = 0.2
    for epoch in range(3):
        with pytest.raises(FormatError, match="image 014"):
            list(load(own).epoch(epoch, views, sample_ids=np.array([sample])))


def test_one_flipped_bit_in_any_image_is_found(load, own):
    """Pixels as well as JPEGs, whether packing converted them or not: many flips leave a JPEG that decodes."""
    random = np.random.default_rng(5)
    whole = own.path.read_bytes()
    for sample in range(len(own)):
        place = int(own.pointers[sample]) + int(random.integers(own.sizes[sample]))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(random.integers(8))
        own.path.write_bytes(flipped)
        with pytest.raises(FormatError, match=f"image {sample:03d}' is damaged: its bytes changed since packing"):
            list(load(own, shuffle=False).epoch(0, whole_views(len(own))))
        with pytest.raises(FormatError, match=f"image {sample:03d}' is damaged"):
            own.read_image(sample)


@pytest.mark.parametrize("damage", [cut_entropy_data, erase_the_head, claim_another_size])
def test_damage_in_files_of_earlier_releases(load, own, damage):
    """These keep no hash of converted images; what does not decode is found all the same."""
    damage(own, 14)
    old = dataclasses.replace(own, stored_hashes=None)
    with pytest.raises(FormatError, match="image 014' is damaged: it cannot be decoded"):
        list(load(old, shuffle=False).epoch(0, whole_views(len(old))))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sound_image_that_is_damaged_later(load, own, workers):
    loader = load(own, workers=workers, shuffle=False)
    assert len(list(loader.epoch(0, whole_views(len(own))))) == 5
    cut_entropy_data(own, 14)
    with pytest.raises(FormatError, match="image 014"):
        list(loader.epoch(1, whole_views(len(own))))


def test_a_file_that_is_cut_off_is_refused(load, own):
    os.truncate(own.path, int(own.pointers[-1] + own.sizes[-1] // 2))
    with pytest.raises(FormatError, match="cut off"):
        load(own)


def test_a_file_that_is_gone(load, own):
    own.path.unlink()
    with pytest.raises(FormatError, match="own.beton"):
        load(own)


def test_what_the_thread_raises_comes_out(load, views, monkeypatch):
    def fail(self, *_):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(EpochThread, "run_pipeline", fail)
    with pytest.raises(TrainingError, match="RuntimeError: the disk is on fire"):
        next(load().epoch(0, views))


def test_a_thread_that_dies_is_noticed(load, views, monkeypatch):
    monkeypatch.setattr(EpochThread, "run", lambda self: None)
    started = time.monotonic()
    with pytest.raises(TrainingError, match="the loading thread ended without an error; run the same again"):
        next(load().epoch(0, views))
    assert time.monotonic() - started < 5


def test_an_item_handed_out_at_the_last_moment_is_not_lost(load, views, monkeypatch):
    # The consumer's wait ends without an item; before it looks at the thread, the thread hands one out and ends.
    batches = load(batch_size=23).epoch(0, views)
    thread = batches._thread
    thread.join(60)
    waits = iter([True])

    def miss_once(*_, **__):
        if next(waits, False):
            raise iterator.queue.Empty
        return type(thread.output_queue).get(thread.output_queue)

    monkeypatch.setattr(thread.output_queue, "get", miss_once)
    assert len(next(batches)) == 23


def test_a_thread_that_does_not_stop_is_an_error(load, views, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(EpochThread, "run_pipeline", lambda self, *_: release.wait(60))
    monkeypatch.setattr(iterator, "_CLOSE_SECONDS", 0.2)
    loader = load()
    loader.epoch(0, views)
    with pytest.raises(TrainingError, match="did not stop"):
        loader.close()
    release.set()
