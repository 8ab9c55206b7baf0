"""Child processes that are killed in the middle of their work."""

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter

# Calls that change what another process sees; a child can be killed before each of them.
STEPS = ("link", "replace", "fsync", "unlink", "rmdir", "mkdir", "ftruncate", "open")


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; gives its process id. The child ends with code 0, or 1 where ``work`` raised."""
    with warnings.catch_warnings():
        # Threads of the test process do not exist in the child, and the child needs none of them.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """A child's exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(work: Callable[[], None]) -> int:
    return wait(fork(work))


def kill_at_step(number: int, work: Callable[[], None]) -> int:
    """Run ``work`` in a child that kills itself before its step ``number``; -9 where it came so far."""

    def counted() -> None:
        left = number

        def before(real):
            def step(*arguments, **options):
                nonlocal left
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return real(*arguments, **options)

            return step

        # A kill, unlike a power cut, loses nothing that the kernel has: so the wait for the disk is spared here.
        os.fsync = lambda descriptor: None
        for name in STEPS:
            setattr(os, name, before(getattr(os, name)))
        work()

    return run(counted)


def write_all(path: Path, spec: LabelSpec, shards: list[bytes], *, pause=0.0) -> None:
    """What a worker of a dump does, with shards that are encoded already."""
    with LabelSetWriter(path, spec, len(shards)) as writer:
        for index in writer.claim_shards():
            time.sleep(pause)
            writer.write_encoded(index, shards[index])
        writer.finish()


def files(path: Path) -> dict[str, bytes]:
    """Everything below a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
