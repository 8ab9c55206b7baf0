"""The loader's threads, and torch's number of threads, which FFCV changes for the whole process."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from stl_offline.errors import InputError


class Workers:
    """Threads that run one compiled function together; ``len(workers)`` of them.

    Compiled functions work without the GIL, so plain threads keep all cores busy. numba's own parallel loops do the
    same, but compile everything that the loop calls a second time, and have threading layers of which some crash where
    two loaders work at once.
    """

    def __init__(self, count: int) -> None:
        """Start ``count`` threads, or as many as there are cores if that is fewer.

        Raises:
            InputError: fewer than one thread was asked for.
        """
        if count < 1:
            raise InputError(f"the loader needs at least one worker, got {count}")
        self._count = min(count, len(os.sched_getaffinity(0)))
        # The calling thread is the first worker. The others end once nothing refers to the pool any more.
        others = self._count - 1
        self._pool = ThreadPoolExecutor(others, thread_name_prefix="stl-offline-worker") if others else None

    def __len__(self) -> int:
        return self._count

    def run(self, work: Callable[..., None], arguments: Sequence[tuple]) -> None:
        """Call ``work`` once per worker, with that worker's arguments, and wait until all calls have returned."""
        futures = [self._pool.submit(work, *own) for own in arguments[1:]]
        try:
            work(*arguments[0])
        finally:
            # Even after a failure: the others still write to the batch.
            wait(futures)
        for future in futures:
            future.result()


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Undo what the code inside does to torch's number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
