"""Views as training needs them: equal to a cache of all views, two spans on disk, and no half cache after a kill."""

import os
import signal
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError, JoinError, TargetError
from stl_offline.labels import views_ahead
from stl_offline.labels.cache import CacheMaker, Stopped, build_token_cache
from stl_offline.labels.cache_file import cache_bytes
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.views_ahead import ViewsAhead, run_bytes, span_views
from tests.labels.crash import kill_at_step, run
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SAMPLES, VIEWS = 11, 5
POLICY = {"match": "key", "missing": "error", "allow_changed": False}
ARRAYS = ("class_ids", "probabilities", "confidence", "draws", "head_ids", "head_masses", "views")
KINDS = {
    "q8": {"encoding": "q8"},
    "f16": {"container": "webdataset"},
    "draws": {"top_k": 0, "draws": 3, "has_confidence": False, "class_draws": 2, "encoding": "q8"},
    "both": {"draws": 2, "class_top_k": 3, "container": "webdataset", "encoding": "q8"},
}


@pytest.fixture(scope="module", params=KINDS)
def labels(request, tmp_path_factory):
    """A set of five views, and the cache of all of them, for nine of its eleven images."""
    folder = tmp_path_factory.mktemp("labels")
    write_set(folder / "set", make_spec(samples=SAMPLES, view_count=VIEWS, **KINDS[request.param]), 3)
    label_set = open_label_set(folder / "set")
    return label_set, build_token_cache(label_set, *images(label_set), folder=folder / "whole")


def images(label_set):
    order = np.random.default_rng(1).permutation(SAMPLES)[:9]
    hashes = make_arrays(label_set.spec).content_hash
    return [make_key(position) for position in order], hashes[order], label_set.spec.class_names


def ahead_of(label_set, folder, span, monkeypatch):
    monkeypatch.setattr(views_ahead, "SPAN_BYTES", span * cache_bytes(label_set.spec.of_views(range(1)), 9) + 7)
    return ViewsAhead(CacheMaker(label_set.parts, *images(label_set), folder=folder, **POLICY))


def check_view(ahead, whole, epoch, epochs):
    """One epoch's view has the numbers that it has in the cache of all views."""
    cache, place = ahead.of_epoch(epoch, epochs)
    for name in ARRAYS:
        ours, theirs = getattr(cache, name), getattr(whole, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours[:, place], theirs[:, epoch % VIEWS], err_msg=name)
    np.testing.assert_array_equal(cache.labelled, whole.labelled)
    assert cache.spec.first_view + place == epoch % VIEWS
    return cache


def spans_on_disk(folder):
    return sorted(path.name.partition("-")[2] for path in folder.iterdir() if path.is_dir())


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span=st.integers(1, VIEWS), start=st.integers(0, 13), count=st.integers(1, 12))
def test_every_epoch_reads_its_view(labels, tmp_path_factory, span, start, count):
    """From any epoch on, in spans of any length: equal numbers, and never more than two spans on disk."""
    label_set, whole = labels
    folder = tmp_path_factory.mktemp("spans")
    with pytest.MonkeyPatch.context() as patch:
        ahead = ahead_of(label_set, folder, span, patch)
        for epoch in range(start, start + count):
            cache = check_view(ahead, whole, epoch, start + count)
            size = sum(file.stat().st_size for file in cache.path.glob("*.npy"))
            assert size <= span * cache_bytes(whole.spec.of_views(range(1)), 9) + 2000
            assert len(spans_on_disk(folder)) <= 2
        ahead.close()
    assert len(spans_on_disk(folder)) <= 2
    assert {path.suffix for path in folder.iterdir() if not path.is_dir()} == {".lock"}
    assert not [thread for thread in threading.enumerate() if thread.name == "stl-offline-views"]


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_the_next_view_is_there_when_its_epoch_begins(labels, tmp_path, monkeypatch):
    label_set, whole = labels
    ahead = ahead_of(label_set, tmp_path, 2, monkeypatch)
    assert not spans_on_disk(tmp_path)  # where a run begins is not known yet
    ahead.of_epoch(1, 4)
    ahead._next.join()
    assert spans_on_disk(tmp_path) == ["0-1", "2-3"]
    monkeypatch.setattr("stl_offline.labels.cache._fill", None)
    check_view(ahead, whole, 2, 4)
    check_view(ahead, whole, 3, 4)
    assert ahead._next is None  # no epoch of this run reads another view


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_a_set_that_fits_into_one_span_has_one_cache_that_is_kept(labels, tmp_path, monkeypatch):
    label_set, whole = labels
    path = build_token_cache(label_set, *images(label_set), folder=tmp_path).path
    monkeypatch.setattr("stl_offline.labels.cache._fill", None)
    ahead = ahead_of(label_set, tmp_path, VIEWS, monkeypatch)
    for epoch in (0, 7, 4):
        assert check_view(ahead, whole, epoch, 9).path == path
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == [path.name]


@pytest.mark.parametrize("labels", ["q8", "both"], indirect=True)
@pytest.mark.parametrize("span", [1, 2])
def test_a_divided_set_is_read_once(labels, tmp_path, monkeypatch, span):
    """Counted where shards are read: each epoch reads the parts of its own views, and a pass over all views the set
    once, as `bytes_read` foretells. The shards of an undivided set are read for every cache."""
    label_set, whole = labels
    convert(label_set, tmp_path / "parts", views_per_part=span)
    read, original = [0], LabelSet.read_bytes

    def count(self, index, **options):
        data = original(self, index, **options)
        read[0] += len(data)
        return data

    monkeypatch.setattr(LabelSet, "read_bytes", count)
    for divided in (False, True):
        each = open_label_set(tmp_path / "parts") if divided else label_set
        ahead = ahead_of(each, tmp_path / f"spans-{divided}", span, monkeypatch)
        total = sum(shard.bytes for shard in each.shards)
        spans = -(-VIEWS // span)
        assert ahead.bytes_read() == (total if divided else spans * total, total)
        for epoch in range(VIEWS):
            read[0] = 0
            # The last epoch of a run, so that nothing is made in the background.
            check_view(ahead, whole, epoch, epoch + 1)
            size = sum(each.shards[index].bytes for part in each.parts[epoch // span :][:1] for index in part.present)
            assert read[0] == (0 if epoch % span else size if divided else total)
        ahead.close()


def test_disk_use_does_not_grow_with_the_views():
    """ImageNet-1K, 14 × 14 tokens: under 2 GB with one draw for each token, under 20 GB with the top 5."""
    images, grid = 1_281_167, {"classes": 1000, "grid": (14, 14)}
    for kind, most in (({"top_k": 0, "draws": 1, "has_confidence": False}, 2e9), ({"top_k": 5}, 20e9)):
        sizes = [run_bytes(make_spec(view_count=views, **grid, **kind), images) for views in (30, 350, 2000)]
        assert len(set(sizes)) == 1 and 0.5 * most < sizes[0] < most
    few = make_spec(view_count=3, **grid)
    assert span_views(few, 100) == 3 and run_bytes(few, 100) == cache_bytes(few, 100)


def test_a_span_holds_whole_groups_of_views_that_are_read_together(monkeypatch):
    spec = make_spec(view_count=30, classes=1000, grid=(14, 14))
    monkeypatch.setattr(views_ahead, "SPAN_BYTES", 10 * cache_bytes(spec.of_views(range(1)), 100))
    assert [span_views(spec, 100, repeats) for repeats in (1, 4, 7, 12, 40)] == [10, 8, 7, 12, 30]
    assert run_bytes(spec.of_views(range(28)), 100, 4) == cache_bytes(spec.of_views(range(16)), 100)
    assert run_bytes(spec, 100, 4) == 3 * cache_bytes(spec.of_views(range(8)), 100)


class CountedMaker:
    """A `CacheMaker` whose caches are views alone: ``alive`` has those that are on disk, or mapped by a reader."""

    class Cache:
        def __init__(self, views):
            self.views, self.labelled = views, np.ones(1)

    def __init__(self, spec):
        self.spec, self.images, self.views = spec, 1, range(spec.views_per_image)
        self.disk, self.alive = {}, weakref.WeakSet()

    def join(self, number):
        return SimpleNamespace(shard=np.zeros(1))

    def make(self, views, keep=(), stop=None):
        if views not in self.disk:
            self.disk = {each: cache for each, cache in self.disk.items() if each in keep}
            self.disk[views] = self.Cache(views)
            self.alive.add(self.disk[views])
        return self.disk[views]


@pytest.mark.parametrize(
    ("views", "repeats", "groups", "spans"),
    [
        (8, 2, 1, [2, 2]),
        (7, 2, 1, [2, 2, 2]),  # 5 | 6, 0: with the one after
        (13, 2, 2, [4, 4, 4]),
        (13, 4, 1, [4, 4, 4, 1]),  # 11 | 12 | 0, 1, while 4 … 7 are made
        (9, 4, 1, [4, 4, 4, 1]),  # 4 … 7 both mapped and made again: more than all views
        (5, 4, 1, [5]),
    ],
)
def test_no_group_needs_more_disk_than_was_foretold(monkeypatch, views, repeats, groups, spans):
    spec = make_spec(view_count=views)
    monkeypatch.setattr(views_ahead, "SPAN_BYTES", groups * repeats * cache_bytes(spec.of_views(range(1)), 1))
    maker = CountedMaker(spec)
    ahead, most, epochs = ViewsAhead(maker, repeats), 0, 3 * views * repeats
    for first in range(0, epochs, repeats):
        group = [ahead.of_epoch(epoch, epochs) for epoch in range(first, first + repeats)]
        assert [cache.views[place] for cache, place in group] == [(first + each) % views for each in range(repeats)]
        if ahead._next is not None:
            ahead._next.join()
        most = max(most, sum(len(cache.views) for cache in maker.alive))
    assert most == sum(spans)
    # A cache holds a byte for each image, besides its views.
    assert run_bytes(spec, 1, repeats) == pytest.approx(most * cache_bytes(spec.of_views(range(1)), 1), rel=0.01)


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_killed_at_any_step_it_goes_on_from_any_view(labels, tmp_path, monkeypatch):
    label_set, whole = labels
    for step in range(0, 400, 17):
        folder = tmp_path / str(step)

        def work(folder=folder):
            ahead = ahead_of(label_set, folder, 1, monkeypatch)
            for epoch in range(4):
                check_view(ahead, whole, epoch, 4)

        code = kill_at_step(step, work)
        if code == 0:
            break
        assert code == -signal.SIGKILL

        def resume(folder=folder):
            ahead = ahead_of(label_set, folder, 1, monkeypatch)
            for epoch in (3, 4, 12, 13):
                check_view(ahead, whole, epoch, 14)
            ahead.close()

        assert run(resume) == 0
        assert len(spans_on_disk(folder)) <= 2
        assert not list(folder.glob(".*"))
    else:
        pytest.fail("no process came to its end")
    assert step > 30


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_runs_at_different_views_do_not_disturb_each_other(labels, tmp_path, monkeypatch):
    """Each removes what it does not need itself; what the other has open stays readable."""
    label_set, whole = labels
    ours, theirs = (ahead_of(label_set, tmp_path, 1, monkeypatch) for _ in range(2))
    for epoch in range(4):
        mine = check_view(ours, whole, epoch, 9)
        check_view(theirs, whole, epoch + 2, 9)
        np.testing.assert_array_equal(mine.views[:, 0], whole.views[:, epoch])
    ours.close()
    theirs.close()


def test_what_goes_wrong_in_the_background_comes_out_with_the_epoch(tmp_path, monkeypatch):
    write_set(tmp_path / "set", make_spec(samples=SAMPLES, view_count=VIEWS), 3)
    label_set = open_label_set(tmp_path / "set")
    ahead = ahead_of(label_set, tmp_path / "spans", 1, monkeypatch)
    ahead.of_epoch(0, 1)
    ahead._now = None
    file = tmp_path / "set" / label_set.shards[1].name
    os.truncate(file, 100)
    ahead.of_epoch(0, 2)
    with pytest.raises(FormatError, match=f"{file.name} has 100 bytes"):
        ahead.of_epoch(1, 2)


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_a_failure_in_the_background_that_is_over_ends_nothing(labels, tmp_path, monkeypatch, caplog):
    """A store may be out of reach while the next views are read, and well again when they are needed."""
    label_set, whole = labels
    ahead = ahead_of(label_set, tmp_path, 1, monkeypatch)
    make, calls = CacheMaker.make, []

    def fails_ahead(*args, **settings):
        calls.append(threading.current_thread().name)
        if len(calls) == 2:
            raise TargetError("503")
        return make(*args, **settings)

    monkeypatch.setattr(CacheMaker, "make", fails_ahead)
    for epoch in range(2):
        check_view(ahead, whole, epoch, 2)
    assert calls == ["MainThread", "stl-offline-views", "MainThread"]
    assert "reading the next views ahead failed (503); trying again" in caplog.text
    ahead.close()


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_work_in_the_background_stops_when_it_is_asked_to(labels, tmp_path):
    label_set, _ = labels
    maker = CacheMaker([label_set], *images(label_set), folder=tmp_path, **POLICY)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        maker.make(range(2, 4), stop=stop)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("labels", ["both"], indirect=True)
def test_labels_of_other_images_are_found_before_training(labels, tmp_path, monkeypatch):
    label_set, _ = labels
    monkeypatch.setattr(views_ahead, "SPAN_BYTES", 1)
    keys, hashes, names = images(label_set)
    with pytest.raises(JoinError, match="9 images changed"):
        ViewsAhead(CacheMaker([label_set], keys, hashes + np.uint64(1), names, folder=tmp_path, **POLICY))
    with pytest.raises(TargetError, match="cannot make the folder"):
        CacheMaker([label_set], keys, hashes, names, folder="/proc/cache", **POLICY)
    assert not spans_on_disk(tmp_path)
