"""One job on one folder: a lock that the kernel frees when its holder dies.

Every process of a job holds a shared lock on one file. The first to come, which finds nobody there, holds it alone for
a moment, cleans up after a killed job and writes its job's id into the file; a process with another id is refused. So
a killed job leaves nothing that must be unlocked by hand, and two jobs never write into one folder.
"""

import fcntl
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from stl_offline.errors import TargetError
from stl_offline.files import make_folder

# How long a lock may look taken before it is: another process may be just coming or going.
_PATIENCE_SECONDS = 1.5


def job_from_environment() -> str | None:
    """An id that all processes of one torchrun job share, or None outside of one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return " ".join(os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"))


class JobLock:
    """The lock file ``path`` held for the job ``job`` (None: a job of this one process).

    ``clean`` is called, while no other process is there, before the lock is shared.

    Raises:
        TargetError: another job is at work there, or the file cannot be written.
    """

    def __init__(self, path: Path, job: str | None, clean: Callable[[], None]) -> None:
        self._file: int | None = None
        name = (job if job is not None else f"alone {secrets.token_hex(8)}").encode()
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while self._file is None:
            self._file = _try(path, name, clean)
            if self._file is None:
                if time.monotonic() > deadline:
                    folder = path.parent.parent
                    raise TargetError(
                        f"another job is writing into {folder}; wait for it, stop it, or choose another folder"
                    )
                time.sleep(0.05)

    def release(self) -> None:
        """Free the lock; a second time does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def try_lock(path: Path) -> int | None:
    """A descriptor that holds ``path`` alone until it is closed, or None where another process holds it."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    if _flock(file, fcntl.LOCK_EX):
        return file
    os.close(file)
    return None


def _try(path: Path, name: bytes, clean: Callable[[], None]) -> int | None:
    make_folder(path.parent)
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TargetError(f"cannot write into {path.parent.parent}: {error.strerror}; choose another target") from error
    try:
        if _flock(file, fcntl.LOCK_EX):
            # A job that ended may have removed the file between our opening and locking it.
            if _is_current(path, file):
                clean()
                os.ftruncate(file, 0)
                os.pwrite(file, name, 0)
            # Going down to a shared lock is not atomic: somebody else may get in between, so the id is read again.
            fcntl.flock(file, fcntl.LOCK_SH)
        elif not _flock(file, fcntl.LOCK_SH):
            return None
        if _is_current(path, file) and os.pread(file, 4096, 0) == name:
            held, file = file, -1
            return held
        return None
    finally:
        if file >= 0:
            os.close(file)


def _flock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_current(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False
