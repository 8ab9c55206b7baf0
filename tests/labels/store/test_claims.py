"""Workers that share a label set: one gets each shard, stopped ones are relieved, and late ones change nothing."""

import itertools
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest

from stl_offline import remote
from stl_offline.errors import TargetError
from stl_offline.labels.format import encode_shard
from stl_offline.labels.store import Claims, claims, open_storage, records, storage
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files, fork, wait, write_all
from tests.labels.synthetic import make_arrays, make_spec, write_set

SPEC = make_spec(samples=13)
SHARDS = 3


@pytest.fixture(scope="module")
def encoded():
    ranges = [(index * 13 // SHARDS, (index + 1) * 13 // SHARDS) for index in range(SHARDS)]
    return [encode_shard(make_arrays(SPEC, *each), SPEC) for each in ranges]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed") / "labels"
    write_set(path, SPEC, SHARDS)
    return files(path)


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    if request.param == "s3":
        return request.getfixturevalue("s3") + "/labels"
    return str(tmp_path / "labels") if request.param == "folder" else f"memory://{tmp_path.name}/labels"


def stored(place):
    """The files of a storage by name."""
    here = open_storage(place)
    return {name: here.read(name) for name in here.names() if here.size(name)}


# What every storage promises to workers.


def test_a_file_is_created_once(place):
    here = open_storage(place)
    assert here.create("a/b", b"first") == b"first"
    assert here.create("a/b", b"second") == b"first"
    assert here.create("a/b", b"first") == b"first"
    here.remove_file("a/b")
    here.remove_file("a/b")
    assert here.create("a/b", b"third") == b"third" == here.read("a/b")


def test_of_several_that_create_a_file_one_does(place):
    here = open_storage(place)
    for attempt in range(5):
        with ThreadPoolExecutor(4) as pool:
            got = list(pool.map(lambda each, name=f"file {attempt}": here.create(name, each), [b"a", b"b", b"c", b"d"]))
        assert set(got) == {here.read(f"file {attempt}")}


def test_stamps_change_when_a_file_is_written_again(place):
    here = open_storage(place)
    here.write("a/one", b"1")
    here.write("a/two", b"2")
    before = here.stamps("a")
    assert before == here.stamps("a") and here.sizes("a") == {"one": 1, "two": 1}
    here.write("a/two", b"3")
    after = here.stamps("a")
    assert after["one"] == before["one"] and after["two"] != before["two"]
    assert here.stamps("nothing") == here.sizes("nothing") == {}


def test_an_answer_that_is_lost_does_not_lose_the_claim(s3, flaky, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    here = open_storage(s3 + "/labels")
    here.create("warm", b"x")
    flaky.break_next(1, 0)
    assert here.create("claim", b"mine") == b"mine"
    assert flaky.broken == 1


# Claims.


def test_a_shard_is_claimed_once(place):
    with Claims(open_storage(place)) as ours, Claims(open_storage(place)) as theirs:
        assert ours.take(1) and not theirs.take(1) and theirs.take(0)
        assert ours.others() == {0: "00000-0"} and theirs.others() == {1: "00001-0"}
        ours.release(1)
        assert theirs.others() == {} and theirs.take(1)
    assert open_storage(place).names(".partial/claims") == []


def test_a_claim_that_is_renewed_lives(place, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.05)
    with Claims(open_storage(place)) as ours, Claims(open_storage(place)) as theirs:
        assert ours.take(5)
        first = open_storage(place).stamps(".partial/claims")
        deadline = time.monotonic() + 20
        while open_storage(place).stamps(".partial/claims") == first:
            assert time.monotonic() < deadline
        monkeypatch.setattr(claims, "LIFE_SECONDS", -math.inf)  # each claim that is listed is dead
        name = theirs.others()[5]
        assert theirs.is_dead(name) and theirs.take(5, name)
        # What the first still renews is not the newest claim.
        assert ours.others() == {} and theirs.others() == {}
        theirs.release(5)
    assert open_storage(place).names(".partial/claims") == []


def test_a_claim_that_is_renewed_outlives_a_watcher_that_stood_still(place, monkeypatch):
    """Suspended between two looks, or kept waiting by the store: what it listed before is no sign of a dead claim."""
    now = [0.0]
    monkeypatch.setattr(claims, "time", SimpleNamespace(monotonic=lambda: now[0]))
    here = open_storage(place)
    stamps = here.stamps

    def slow(folder):
        found = stamps(folder)
        now[0] += claims.LIFE_SECONDS
        return found

    with Claims(open_storage(place)) as ours, Claims(here) as theirs:
        assert ours.take(5)
        name = theirs.others()[5]
        now[0] += claims.LIFE_SECONDS
        assert not theirs.is_dead(name)
        open_storage(place).write(f".partial/claims/{name}", b"renewed")
        assert theirs.others() == {5: name} and not theirs.is_dead(name)
        monkeypatch.setattr(here, "stamps", slow)
        assert theirs.others() == {5: name} and not theirs.is_dead(name)
        assert theirs.others() == {5: name} and theirs.is_dead(name)


def test_of_several_that_take_over_one_does(place, monkeypatch):
    monkeypatch.setattr(claims, "LIFE_SECONDS", -math.inf)  # each claim that is listed is dead
    with Claims(open_storage(place)) as dead, Claims(open_storage(place)) as one, Claims(open_storage(place)) as other:
        assert dead.take(2)
        seen = one.others()[2], other.others()[2]
        assert seen == ("00002-0", "00002-0") and one.is_dead(seen[0]) and other.is_dead(seen[1])
        assert [one.take(2, seen[0]), other.take(2, seen[1])] == [True, False]
        assert other.others() == {2: "00002-1"}


def test_the_claim_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path, encoded, undisturbed):
    child = fork(partial(write_all, tmp_path / "labels", SPEC, encoded, pause=60))
    while not list((tmp_path / "labels").glob(".partial/claims/*-0")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    with Claims(open_storage(tmp_path / "labels")) as ours:
        assert not ours.is_dead(ours.others()[0])
        os.kill(child, signal.SIGKILL)
        while not ours.is_dead(ours.others()[0]):  # also before its parent has asked for its exit code
            time.sleep(0.01)
    assert wait(child) == -signal.SIGKILL
    started = time.monotonic()
    write_all(tmp_path / "labels", SPEC, encoded)
    assert time.monotonic() - started < claims.LIFE_SECONDS / 4
    assert files(tmp_path / "labels") == undisturbed


def test_a_suspended_worker_is_relieved_and_changes_nothing_later(tmp_path, encoded, undisturbed, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(claims, "LIFE_SECONDS", 1.0)
    child = fork(partial(write_all, tmp_path, SPEC, encoded, pause=0.3))
    while not list(tmp_path.glob(".partial/claims/*-0")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGSTOP)
    try:
        write_all(tmp_path, SPEC, encoded)
        assert {name: data for name, data in files(tmp_path).items() if not name.startswith(".partial")} == undisturbed
        written = {path.name: path.stat().st_ino for path in tmp_path.iterdir() if path.is_file()}
    finally:
        os.kill(child, signal.SIGCONT)
    assert wait(child) == 0
    assert files(tmp_path) == undisturbed
    assert {path.name: path.stat().st_ino for path in tmp_path.iterdir() if path.is_file()} == written


def test_a_worker_that_fails_stops_nobody(place, encoded, undisturbed):
    with pytest.raises(ZeroDivisionError), LabelSetWriter(place, SPEC, SHARDS) as writer:
        for _ in writer.claim_shards():
            raise ZeroDivisionError
    write_all(place, SPEC, encoded)
    assert stored(place) == undisturbed


def test_workers_of_one_set_share_it_in_any_storage(place, encoded, undisturbed):
    written = []

    def work():
        with LabelSetWriter(place, SPEC, SHARDS) as writer:
            for index in writer.claim_shards():
                written.append(index)
                writer.write_encoded(index, encoded[index])
            writer.finish()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stored(place) == undisturbed and open_storage(place).names(".partial") == []
    assert sorted(written) == [0, 1, 2]


def test_a_worker_that_saw_free_shards_writes_none_of_a_set_that_others_finished(place, encoded, undisturbed):
    with LabelSetWriter(place, SPEC, SHARDS) as slow, LabelSetWriter(place, SPEC, SHARDS) as quick:
        seen, left = slow.claim_shards(), quick.claim_shards()
        assert next(seen) == 0
        for index in (next(left), next(left)):
            quick.write_encoded(index, encoded[index])
        slow.write_encoded(0, encoded[0])
        assert list(left) == []
        quick.finish()
        assert list(seen) == [] and slow.complete
    assert stored(place) == undisturbed and open_storage(place).names(".partial") == []


def test_a_worker_that_asks_ahead_is_asked_to_write_before_it_waits(place, encoded, undisturbed):
    with LabelSetWriter(place, SPEC, SHARDS) as ahead, LabelSetWriter(place, SPEC, SHARDS) as other:
        given, taken = ahead.claim_ahead(), other.claim_shards()
        assert [next(given), next(taken), next(given)] == [0, 1, 2] and next(given) is None
        ahead.write_encoded(2, encoded[2])
        assert next(given) is None
        ahead.write_encoded(0, encoded[0])
        other.write_encoded(1, encoded[1])
        assert list(given) == []
        ahead.finish()
        assert list(taken) == []
    assert stored(place) == undisturbed and open_storage(place).names(".partial") == []


def test_shards_that_a_thread_of_the_caller_writes_are_waited_for(place, encoded, undisturbed):
    with LabelSetWriter(place, SPEC, SHARDS) as writer, ThreadPoolExecutor(1) as background:
        given = writer.claim_shards()
        assert [next(given), next(given), next(given)] == [0, 1, 2]
        rest = background.submit(list, given)
        for index in (2, 0, 1):
            assert not rest.done()
            writer.write_encoded(index, encoded[index])
        assert rest.result(60) == []
        writer.finish()
    assert stored(place) == undisturbed


def test_a_worker_with_other_settings_is_refused(place):
    with LabelSetWriter(place, SPEC, SHARDS) as writer:
        next(writer.claim_shards())
        with (
            pytest.raises(TargetError, match="top_k is 3 and 4"),
            LabelSetWriter(place, make_spec(samples=13, top_k=3), SHARDS),
        ):
            pass


def test_a_damaged_shard_is_found_at_the_end_and_written_again(tmp_path, encoded, undisturbed):
    with LabelSetWriter(tmp_path, SPEC, SHARDS) as writer:
        writer.write_encoded(1, encoded[1])
        (tmp_path / writer.shard_name(1)).write_bytes(b"cut")
    write_all(tmp_path, SPEC, encoded)
    assert files(tmp_path) == undisturbed


@pytest.mark.parametrize(("workers", "shards", "block"), [(1, 60, 1000), (6, 60, 1000), (6, 60, 7), (8, 400, 20)])
def test_requests_grow_as_shards(workers, shards, block, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "BLOCK_SHARDS", block)
    spec = make_spec(samples=shards)
    data = encode_shard(make_arrays(spec, 0, 1), spec)  # of each shard: nothing here looks into them
    counts, persist = Counter(), storage.ObjectStorage._persist

    def count(self, what, *arguments):
        counts[what.partition(" ")[0]] += 1
        return persist(self, what, *arguments)

    monkeypatch.setattr(storage.ObjectStorage, "_persist", count)
    place = f"memory://{tmp_path.name}/labels"

    def work():
        with LabelSetWriter(place, spec, shards) as writer:
            writer.unrecorded()
            for index in writer.claim_shards():
                time.sleep(0.6 / shards)
                writer.write_encoded(index, data)
            writer.finish()

    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result(60)
    # Of each shard: claim, shard, record; its record at the end; and what is lost where two want the same.
    assert 3 * shards <= counts["write"] <= 3 * shards + 25 * workers
    assert counts["read"] <= 2 * shards + 25 * workers
    assert counts["look"] <= 4 * shards + 40 * workers
    assert counts["remove"] <= shards + 25 * workers
    assert counts["list"] <= 50 * workers + 4 * shards / block


def in_time(work):
    """Run it in a thread that a test does not wait for if it never ends."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_what_a_worker_gives_up_is_taken_while_others_still_work(place, encoded, undisturbed):
    """A block that has been marked as taken is open again."""
    with LabelSetWriter(place, SPEC, SHARDS) as slow:
        kept = slow.claim_shards()
        assert next(kept) == 0
        with pytest.raises(ZeroDivisionError), LabelSetWriter(place, SPEC, SHARDS) as fails:
            given = fails.claim_shards()
            assert {next(given), next(given)} == {1, 2}
            other = threading.Thread(target=write_shards, args=(place, encoded, 2), daemon=True)
            other.start()
            deadline = time.monotonic() + 60
            while "00000.taken" not in open_storage(place).names(".partial/records"):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            raise ZeroDivisionError
        other.join(60)
        assert slow.missing() == [0] and not other.is_alive()
        slow.write_encoded(0, encoded[0])
        assert list(kept) == []
        slow.finish()
    assert stored(place) == undisturbed


def write_shards(place, encoded, count):
    """Write so many shards as one more worker."""
    with LabelSetWriter(place, SPEC, SHARDS) as writer:
        for index in itertools.islice(writer.claim_shards(), count):
            writer.write_encoded(index, encoded[index])


@pytest.mark.parametrize("recorded", [0, 2])
def test_a_mark_of_a_block_that_lacks_records_is_found_at_the_end(place, encoded, undisturbed, recorded):
    """Left by a worker that listed the block just before another one gave a claim up."""
    in_time(lambda: write_shards(place, encoded, recorded))
    open_storage(place).write(".partial/records/00000.taken", b"")
    in_time(lambda: write_all(place, SPEC, encoded))
    assert stored(place) == undisturbed


@pytest.mark.parametrize("workers", [1, 12])
def test_claims_on_recorded_shards_do_not_delay_the_manifest(place, workers):
    """As those of a whole machine that was suspended, relieved, and goes on."""
    spec = make_spec(samples=workers)
    with LabelSetWriter(place, spec, workers) as writer:
        for index in range(workers):
            writer.write_shard(index, make_arrays(spec, index, index + 1))
        for index in range(workers):
            open_storage(place).write(f".partial/claims/{index:05d}-0", b'{"machine": "other", "pid": 1}')

        def end():
            assert list(writer.claim_shards()) == []
            writer.finish()

        in_time(end)
        assert writer.complete


@pytest.mark.parametrize("name", ["00000-0", "00099-0", "00003-0"])
def test_claims_of_other_machines_that_mean_nothing_hold_nobody_up(place, encoded, undisturbed, name):
    """On a shard that is recorded (its worker was killed right after that, or is late), or of an earlier job that had
    more shards. Only the manifest's claim, whose number is that after the last shard's, may still be worked on."""
    write_shards(place, encoded, 1)
    open_storage(place).write(f".partial/claims/{name}", b'{"host": "other", "machine": "other", "pid": 1}')
    work = partial(write_all, place, SPEC, encoded)
    if name == "00003-0":
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(1)
        assert thread.is_alive() and not (open_storage(place).size("manifest.json"))
        open_storage(place).remove_file(f".partial/claims/{name}")
        thread.join(60)
        assert not thread.is_alive()
    else:
        in_time(work)
    assert stored(place) == undisturbed


@pytest.mark.parametrize("damaged", ["record", "shard", ""])
def test_a_shard_that_is_written_while_all_are_looked_at_stays(place, encoded, undisturbed, monkeypatch, damaged):
    """A worker without claims writes it, such as Ray's, after the listing in which it was missing or damaged."""
    write_shards(place, encoded, 2)
    with LabelSetWriter(place, SPEC, SHARDS) as writer, LabelSetWriter(place, SPEC, SHARDS) as late:
        if damaged:
            late.write_encoded(2, encoded[2])
            open_storage(place).write(late._records.path(2) if damaged == "record" else late.shard_name(2), b"cut")
        looks = {"record": (writer, "_read_record"), "shard": (writer, "_read_records")}
        what = looks.get(damaged, (writer._records, "all_recorded"))
        look = getattr(*what)

        def looked(*arguments):
            found = look(*arguments)
            # The second look at this record is that before its removal.
            if damaged != "record" or (arguments == (2,) and next(looked_before)):
                late.write_encoded(2, encoded[2])
            return found

        looked_before = iter((False, True, False))
        monkeypatch.setattr(*what, looked)
        assert not writer._all_whole()
        monkeypatch.undo()
        assert writer._storage.size(writer.shard_name(2)) == len(encoded[2])
        if damaged == "record":
            late.write_encoded(2, encoded[2])
        assert writer._all_whole() and writer.missing() == []
        writer.finish()
    assert stored(place) == undisturbed


@pytest.mark.parametrize("moment", ["created", "removed"])
def test_an_interrupt_between_a_claim_and_its_note_leaves_no_claim(tmp_path, monkeypatch, moment):
    """A signal ends a worker at any instant: once a claim is there and not noted yet, and while one is given up."""
    here = open_storage(str(tmp_path / "labels"))
    create, remove = type(here).create, type(here).remove_file

    def interrupted(function, after):
        def call(self, *arguments):
            monkeypatch.undo()
            if after:
                function(self, *arguments)
            raise KeyboardInterrupt

        return call

    with Claims(here) as other, pytest.raises(KeyboardInterrupt), Claims(here) as ours:
        assert other.take(0) and ours.take(1)
        if moment == "created":
            monkeypatch.setattr(type(here), "create", interrupted(create, after=True))
            ours.take(2)
        else:
            monkeypatch.setattr(type(here), "remove_file", interrupted(remove, after=False))
            ours.release(1)
    assert not here.names(claims.CLAIMS)


def test_an_interrupt_leaves_the_claims_of_others(tmp_path, monkeypatch):
    here = open_storage(str(tmp_path / "labels"))
    create = type(here).create

    def beaten(self, name, data):
        monkeypatch.undo()
        create(self, name, b"another worker's")
        create(self, name, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(type(here), "create", beaten)
    with pytest.raises(KeyboardInterrupt), Claims(here) as ours:
        ours.take(2)
    assert [here.read(f"{claims.CLAIMS}/{name}") for name in here.names(claims.CLAIMS)] == [b"another worker's"]


def test_a_folder_that_is_removed_under_a_write_is_made_again(tmp_path, monkeypatch):
    """By a worker that found the set finished, between the file's creation and the folder's way to the disk."""
    here = open_storage(tmp_path)
    replace = os.replace

    def replace_and_remove(*paths):
        monkeypatch.undo()
        replace(*paths)
        shutil.rmtree(tmp_path / "folder")

    monkeypatch.setattr(os, "replace", replace_and_remove)
    here.write("folder/file", b"x")
    assert here.read("folder/file") == b"x"
