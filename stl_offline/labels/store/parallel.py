"""Several shards at a time, in threads: packing, checksums and networks all let other threads go on."""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from stl_offline.progress import progress_bar

T = TypeVar("T")
R = TypeVar("R")

# How many files are on their way at a time, where a command is not told.
TRANSFERS = 8


def each_shard(
    work: Callable[[T], R], items: Sequence[T], title: str, *, workers: int = 0, transfer: bool = False
) -> Iterator[R]:
    """``work`` of each item, in order, with a progress bar named ``title``; what it raises ends the others.

    workers: shards in work (and in memory) at a time; 0: one for each core, or `TRANSFERS` where shards travel.
    """
    threads = workers or (TRANSFERS if transfer else min(TRANSFERS, os.cpu_count() or 1))
    with (
        progress_bar(len(items), title, "shard", enabled=bool(items)) as progress,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for result in pool.map(work, items):
                progress.update()
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
