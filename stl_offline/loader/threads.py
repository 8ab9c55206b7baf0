"""Threads of numba and torch, which FFCV changes for the whole process.

Two loaders work at the same time (training and validation), each with a thread of its own that starts compiled loops.
numba's fallback threading layer, workqueue, crashes there, so one that is safe for it is asked for, which works until
the first parallel loop runs.
"""

import contextlib
from collections.abc import Iterator

import numba
import torch

from stl_offline.errors import InputError

if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "threadsafe"


def usable_workers(asked: int) -> int:
    """``asked`` threads, or as many as numba may start here if that is fewer (normally the cores).

    Raises:
        InputError: fewer than one worker was asked for, or numba was told to use its layer that is not thread-safe.
    """
    if asked < 1:
        raise InputError(f"the loader needs at least one worker, got {asked}")
    if asked > 1 and numba.config.THREADING_LAYER == "workqueue":
        raise InputError("numba's threading layer 'workqueue' cannot serve two loaders: unset NUMBA_THREADING_LAYER")
    return min(asked, numba.config.NUMBA_NUM_THREADS)


@contextlib.contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Undo what the code inside does to torch's number of threads."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
