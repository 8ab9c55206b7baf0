"""One job on one folder: a lock that needs no unlocking by hand, on one machine and across machines that share disks.

A job's first process takes the lock file, cleans up after a killed job and writes down the job's id, its machine and a
beat that it counts on every few seconds. The job's other processes know the id, and join. Two things say that a job
lives, so that nothing a killed one leaves behind is ever in the way:

- Each process holds a shared ``flock``, which the kernel frees when the process dies. On one machine that is all.
- Some file systems keep ``flock`` to one machine, or have none. So a lock file of another machine is watched for a few
  beats: one that goes on counting belongs to a job that is alive, one that stands still to a dead one.

A process whose lock file was taken over all the same (it was suspended, or cut off from the disk) sees another id there
before its next shard, and stops.
"""

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from stl_offline.errors import TargetError, printable
from stl_offline.files import make_folder

_log = logging.getLogger(__name__)

# How long a lock may look taken before it is: another process may be just coming or going.
_PATIENCE_SECONDS = 1.5
_BEAT_SECONDS = 5.0
# How many beats a job of another machine may miss before it counts as dead.
_MISSED_BEATS = 3
_ENDED = -1
_FILE_BYTES = 512
# A lock file that is a symbolic link would be made, and overwritten, somewhere else.
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class JobLock:
    """The lock file ``path``, held by one process of a job.

    Args:
        path: in a folder of its own below the folder that is written.
        job: an id that the processes of one job share; None: a job of this one process. Where a job has several
            processes, the others must wait for the first to hold the lock.
        clean: called by the job's first process while no other job is there.

    Raises:
        TargetError: another job is at work there, or the file cannot be written.
    """

    def __init__(self, path: Path, job: str | None, clean: Callable[[], None]) -> None:
        self.path = path
        self.job = job or f"alone {secrets.token_hex(8)}"
        self._first = False
        self._file: int | None = None
        self._over = threading.Event()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._file is None:
            self._file = self._try(clean)
            if self._file is None:
                if time.monotonic() > deadline:
                    raise self._taken()
                time.sleep(0.05)
        if self._first:
            threading.Thread(target=self._beat, name="stl-offline-lock", daemon=True).start()

    def check(self) -> None:
        """Raise `TargetError` if this job has the folder no longer; to be called before something is written."""
        if _read(self.path).get("job") != self.job:
            raise self._taken()

    def release(self) -> None:
        """Free the lock; a second time does nothing."""
        self._over.set()
        file, self._file = self._file, None
        if file is None:
            return
        if self._first and _read(self.path).get("job") == self.job:
            # Nobody on another machine needs to watch for a job that has ended as it should.
            _write(file, self.job, _ENDED)
        os.close(file)

    def _try(self, clean: Callable[[], None]) -> int | None:
        file = self._open()
        try:
            locked = _flock(file, fcntl.LOCK_EX)
            if locked is not False:
                self._first = self._take_over(file, locked is True, clean) or self._first
            # Going down to a shared lock is not atomic: somebody else may get in between, so the id is read again.
            shared = _flock(file, fcntl.LOCK_SH) is not False
            if shared and _is_current(self.path, file) and _read(self.path).get("job") == self.job:
                held, file = file, -1
                return held
            return None
        finally:
            if file >= 0:
                os.close(file)

    def _take_over(self, file: int, locked: bool, clean: Callable[[], None]) -> bool:
        """Take the lock file for this job, unless another process of the job has; returns whether it did."""
        state = _read(self.path)
        if state.get("job") == self.job:
            return False
        seen = locked and state.get("machine") == _machine()
        if state and not seen and state.get("beat") != _ENDED and _beats(self.path, state):
            raise self._taken()
        # A job that ended may have removed the file between our opening and locking it.
        if not _is_current(self.path, file):
            return False
        clean()
        _write(file, self.job, 0)
        return True

    def _open(self) -> int:
        make_folder(self.path.parent)
        try:
            return os.open(self.path, _LOCK_FLAGS, 0o666)
        except OSError as error:
            raise TargetError(
                f"cannot write into {self.path.parent.parent}: {error.strerror}; choose another target"
            ) from error

    def _beat(self) -> None:
        beat = 0
        while not self._over.wait(_BEAT_SECONDS):
            beat += 1
            try:
                if _read(self.path).get("job") != self.job:
                    return
                _write(self._file, self.job, beat)
            except (OSError, TypeError):  # a disk that fails for a moment; or the lock was freed meanwhile
                continue

    def _taken(self) -> TargetError:
        state = _read(self.path)
        where = f" on {state['host']}" if state.get("machine", _machine()) != _machine() else ""
        return TargetError(
            f"another job{where} is writing into {self.path.parent.parent}; wait for it, stop it, or choose another "
            "folder"
        )


def try_lock(path: Path) -> int | None:
    """A descriptor that holds ``path`` alone until it is closed, or None where another process holds it."""
    file = os.open(path, _LOCK_FLAGS, 0o666)
    if _flock(file, fcntl.LOCK_EX):
        return file
    os.close(file)
    return None


def _machine() -> str:
    """A name for this machine since it was started; processes with the same name see each other's ``flock``."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _beats(path: Path, before: dict[str, object]) -> bool:
    """Whether the lock file of another machine changes while it is watched."""
    _log.warning(
        "watching %s for %.0f seconds: is the job on %s still running?",
        path,
        _MISSED_BEATS * _BEAT_SECONDS,
        printable(before.get("host")),
    )
    deadline = time.monotonic() + _MISSED_BEATS * _BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_BEAT_SECONDS / 4)
        if _read(path) != before:
            return True
    return False


def _read(path: Path) -> dict[str, object]:
    """The content of the lock file; empty if it is absent. It is opened again each time, so that network file systems
    look for changes."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            state = json.loads(stream.read(_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _write(file: int, job: str, beat: int) -> None:
    state = {"job": job, "machine": _machine(), "host": socket.gethostname(), "beat": beat}
    data = json.dumps(state).encode()
    # Of one length, so that a reader never meets the end of an earlier, longer text.
    os.pwrite(file, data.ljust(_FILE_BYTES), 0)
    os.ftruncate(file, _FILE_BYTES)
    os.fsync(file)


def _flock(file: int, kind: int) -> bool | None:
    """Whether the lock is held; None on a file system without locks, where only the beat counts."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return True


def _is_current(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
