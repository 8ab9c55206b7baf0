"""The lock of a job across machines: ``flock`` does not reach there, so a beat tells who is alive."""

import errno
import fcntl
import json
import os
import signal
import time

import pytest

from stl_offline.errors import TargetError
from stl_offline.labels.store import JobLock
from stl_offline.labels.store import lock as job
from tests.labels.crash import fork, wait


@pytest.fixture
def lock_file(tmp_path):
    return tmp_path / "labels" / ".partial" / "lock"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(job, "_BEAT_SECONDS", 0.1)


def on_another_machine(monkeypatch):
    """From now on this process is on a machine with locks of its own."""
    monkeypatch.setattr(job, "_machine", lambda: "another machine")
    monkeypatch.setattr(fcntl, "flock", lambda file, kind: None)


def hold(lock_file, seconds):
    """A child that holds the lock as a job's first process."""

    def work():
        JobLock(lock_file, "theirs", lambda: None)
        time.sleep(seconds)

    child = fork(work)
    deadline = time.monotonic() + 20
    while job._read(lock_file).get("job") != "theirs":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return child


def test_a_job_that_lives_on_another_machine_is_left_alone(lock_file, monkeypatch):
    child = hold(lock_file, 60)
    on_another_machine(monkeypatch)
    with pytest.raises(TargetError, match=r"another job on \S+ is writing into .*labels"):
        JobLock(lock_file, None, pytest.fail)
    os.kill(child, signal.SIGKILL)
    wait(child)


def test_a_job_that_died_on_another_machine_is_not_in_the_way(lock_file, monkeypatch, caplog):
    child = hold(lock_file, 60)
    os.kill(child, signal.SIGKILL)
    wait(child)
    on_another_machine(monkeypatch)
    cleaned = []
    started = time.monotonic()
    lock = JobLock(lock_file, None, lambda: cleaned.append(1))
    assert cleaned == [1]
    assert time.monotonic() - started >= 0.3, "it was watched"
    assert "still running?" in caplog.text
    lock.check()
    lock.release()


def test_a_job_that_ended_as_it_should_is_not_watched(lock_file, monkeypatch, caplog):
    JobLock(lock_file, "theirs", lambda: None).release()
    on_another_machine(monkeypatch)
    JobLock(lock_file, None, lambda: None).release()
    assert caplog.text == ""


def test_processes_of_a_job_join_it_from_another_machine(lock_file, monkeypatch):
    child = hold(lock_file, 60)
    on_another_machine(monkeypatch)
    lock = JobLock(lock_file, "theirs", pytest.fail)
    lock.check()
    lock.release()
    os.kill(child, signal.SIGKILL)
    wait(child)


def test_who_lost_the_folder_stops(lock_file, monkeypatch):
    """Suspended for so long that another job took it for dead."""
    lost = JobLock(lock_file, None, lambda: None)
    lost._over.set()
    with monkeypatch.context() as patch:
        on_another_machine(patch)
        taken = JobLock(lock_file, None, lambda: None)
        with pytest.raises(TargetError, match="another job is writing"):
            lost.check()
        taken.check()
        lost.release()
        taken.check()
        taken.release()


def test_a_file_system_without_locks(lock_file, monkeypatch):
    def none(file, kind):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    first = JobLock(lock_file, None, lambda: None)
    with pytest.raises(TargetError, match="another job is writing"):
        JobLock(lock_file, None, pytest.fail)
    first._over.set()  # as if it were killed: nothing beats any more
    JobLock(lock_file, None, lambda: None).release()


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"job": 3}', b"\xff" * 700])
def test_a_lock_file_that_says_nothing_is_no_ones(lock_file, text):
    lock_file.parent.mkdir(parents=True)
    lock_file.write_bytes(text)
    lock = JobLock(lock_file, None, lambda: None)
    assert json.loads(lock_file.read_bytes())["job"] == lock.job
    lock.release()
