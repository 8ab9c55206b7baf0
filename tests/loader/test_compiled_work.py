"""Compiled work that threads share out among themselves."""

import numpy as np
import pytest
from numba import carray, cfunc

from stl_offline.loader.compiled_work import WORK_SIGNATURE, pointer, run_work
from stl_offline.loader.decoder import next_item
from stl_offline.loader.threads import usable_workers

_RECORD = np.dtype([("items", np.int64), ("count", np.int64), ("counter", np.int64), ("calls", np.int64)])


@cfunc(WORK_SIGNATURE)
def _add_place(worker, record):
    job = carray(record, 1, _RECORD)[0]
    items = carray(pointer(job.items), job.count, np.float32)
    carray(pointer(job.calls), worker + 1, np.int64)[worker] += 1
    while True:
        place = next_item(carray(pointer(job.counter), 1, np.int64))
        if place >= job.count:
            break
        items[place] += place


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 1001])
def test_every_item_is_done_once_and_every_worker_is_called_once(count, workers):
    workers = usable_workers(workers)
    items, counter, calls = np.ones(count, np.float32), np.zeros(1, np.int64), np.zeros(workers, np.int64)
    record = np.array([(items.ctypes.data, count, counter.ctypes.data, calls.ctypes.data)], dtype=_RECORD)
    run_work(_add_place, record, workers)
    np.testing.assert_array_equal(items, 1 + np.arange(count))
    assert (calls == 1).all()
