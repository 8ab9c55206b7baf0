"""Token targets as an FFCV operation: from the token cache's memory to (B, N, columns), compiled, in the same loader.

n: samples; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; h, w: the student's grid.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit, prange

from stl_offline.errors import InputError
from stl_offline.loader.native import array_at, next_item
from stl_offline.targets import TokenTargets, relative_view_into, target_numbers, token_targets_into

if TYPE_CHECKING:
    from stl_offline.labels.cache import TokenCache

# The control block: int64 numbers and addresses that the compiled loop reads anew for every batch.
_COUNTER, _WORKERS, _SAMPLES, _MAPS, _MAP_ROWS, _MAP_COLUMNS, _STORED, _WIDE_IDS = range(8)
_IDS, _PROBABILITIES, _CONFIDENCE, _MAP_VIEWS, _LABELLED, _VIEWS, _MAP_INDEX = range(8, 15)
_KIND, _RATIO, _UNIFORM, _MIN_CONFIDENCE, _CLASSES, _KEPT, _SEED, _EPOCH = range(15, 23)
_SUMS, _TOUCHED, _ALIGNED_IDS, _ALIGNED_PROBABILITIES, _COVERED = range(23, 28)
_CONTROL_SIZE = 32


class TokenDraw(Operation):
    """FFCV operation behind the class ids that ignores them and gives each sample's token targets.

    Output: a pair, ids int32 (B, h, w, columns) and weights float32 (B, h, w, columns).
    """

    def __init__(self, targets: TokenTargets, cache: "TokenCache", workers: int, seed: int) -> None:
        super().__init__()
        self.targets = targets
        self._cache = cache
        self._workers = workers
        samples, maps, rows, columns, stored = cache.class_ids.shape
        if cache.class_ids.dtype not in (np.uint16, np.uint32):
            raise InputError(f"a token cache holds class ids as uint16 or uint32, not {cache.class_ids.dtype}")
        h, w = targets.grid
        # One of each for every worker.
        self._scratch = {
            _SUMS: np.zeros((workers, cache.num_classes), dtype=np.float32),
            _TOUCHED: np.zeros((workers, cache.num_classes), dtype=np.int32),
            _ALIGNED_IDS: np.zeros((workers, h, w, targets.kept), dtype=np.int32),
            _ALIGNED_PROBABILITIES: np.zeros((workers, h, w, targets.kept), dtype=np.float32),
            _COVERED: np.zeros((workers, h, w), dtype=np.float32),
        }
        self._tables = {
            _IDS: cache.class_ids,
            _PROBABILITIES: cache.probabilities,
            _CONFIDENCE: cache.confidence,
            _MAP_VIEWS: cache.views,
            _LABELLED: cache.labelled,
        }
        self._epoch_tables: tuple[np.ndarray, ...] = ()
        self._control = np.zeros(_CONTROL_SIZE, dtype=np.int64)
        control = self._control
        control[[_WORKERS, _SAMPLES, _MAPS, _MAP_ROWS, _MAP_COLUMNS, _STORED]] = (
            workers,
            samples,
            maps,
            rows,
            columns,
            stored,
        )
        control[_WIDE_IDS] = cache.class_ids.dtype == np.uint32
        kind, ratio, uniform, min_confidence, classes = target_numbers(targets, cache.num_classes)
        control[[_KIND, _RATIO, _UNIFORM, _CLASSES, _KEPT]] = kind, ratio, uniform, classes, targets.kept
        control[_MIN_CONFIDENCE] = np.float64(min_confidence).view(np.int64)
        control[_SEED] = np.uint64(seed % 2**64).view(np.int64)
        for place, array in (self._scratch | self._tables).items():
            if not array.flags.c_contiguous:
                raise InputError("a token cache's arrays must be contiguous; build it again")
            control[place] = array.ctypes.data

    def set_epoch(self, epoch: int, views: np.ndarray, map_index: np.ndarray | None) -> None:
        """Give targets for these student views, float32 (n, 6), from these maps, int64 (n,) or all the first.

        No batch may be under way.

        Raises:
            InputError: map_index has another length or names a map that is not stored.
        """
        samples, maps = self._cache.class_ids.shape[:2]
        if map_index is None:
            map_index = np.zeros(samples, dtype=np.int64)
        map_index = np.ascontiguousarray(map_index, dtype=np.int64)
        if map_index.shape != (samples,) or (samples and (map_index.min() < 0 or map_index.max() >= maps)):
            raise InputError(f"map_index must be {samples:,} numbers in 0 … {maps - 1}, got {map_index.shape}")
        self._epoch_tables = (views, map_index)
        self._control[[_VIEWS, _MAP_INDEX]] = views.ctypes.data, map_index.ctypes.data
        self._control[_EPOCH] = epoch

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (*self.targets.grid, self.targets.columns)
        queries = (AllocationQuery(shape, np.dtype("i4")), AllocationQuery(shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        control_address = self._control.ctypes.data
        draw_batch = _draw_batch_parallel if self._workers > 1 else _draw_batch

        def token_draw(_class_ids, destinations, batch_indices):
            draw_batch(batch_indices, destinations[0], destinations[1], np.int64(control_address))
            return destinations

        token_draw.with_indices = True
        return token_draw


@njit(cache=True, nogil=True)
def _work_with(worker, class_ids, batch_indices, out_ids, out_weights, control_address):
    control = array_at(control_address, (_CONTROL_SIZE,), np.int64)
    samples, maps = control[_SAMPLES], control[_MAPS]
    map_rows, map_columns, stored = control[_MAP_ROWS], control[_MAP_COLUMNS], control[_STORED]
    probabilities = array_at(control[_PROBABILITIES], (samples, maps, map_rows, map_columns, stored), np.float32)
    confidence = array_at(control[_CONFIDENCE], (samples, maps, map_rows, map_columns), np.float32)
    map_views = array_at(control[_MAP_VIEWS], (samples, maps, 6), np.float32)
    labelled = array_at(control[_LABELLED], (samples,), np.uint8)
    views = array_at(control[_VIEWS], (samples, 6), np.float32)
    map_index = array_at(control[_MAP_INDEX], (samples,), np.int64)
    workers, classes, kept = control[_WORKERS], control[_CLASSES], control[_KEPT]
    h, w = out_ids.shape[1], out_ids.shape[2]
    sums = array_at(control[_SUMS], (workers, classes), np.float32)[worker]
    touched = array_at(control[_TOUCHED], (workers, classes), np.int32)[worker]
    aligned_ids = array_at(control[_ALIGNED_IDS], (workers, h, w, kept), np.int32)[worker]
    aligned_probabilities = array_at(control[_ALIGNED_PROBABILITIES], (workers, h, w, kept), np.float32)[worker]
    covered = array_at(control[_COVERED], (workers, h, w), np.float32)[worker]
    min_confidence = array_at(control_address + 8 * _MIN_CONFIDENCE, (1,), np.float64)[0]
    seed = np.uint64(control[_SEED])
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = next_item(control_address + 8 * _COUNTER)
        if place >= len(batch_indices):
            break
        sample = np.int64(batch_indices[place])
        if labelled[sample] == 0:
            out_ids[place] = -1
            out_weights[place] = 0.0
            continue
        chosen = map_index[sample]
        relative_view_into(map_views[sample, chosen], views[sample], relative)
        token_targets_into(
            class_ids[sample, chosen],
            probabilities[sample, chosen],
            confidence[sample, chosen],
            relative,
            control[_KIND],
            control[_RATIO],
            control[_UNIFORM] != 0,
            np.float32(min_confidence),
            classes,
            seed,
            np.uint64(control[_EPOCH]),
            np.uint64(sample),
            sums,
            touched,
            aligned_ids,
            aligned_probabilities,
            covered,
            out_ids[place],
            out_weights[place],
        )


@njit(cache=True, nogil=True)
def _work(worker, batch_indices, out_ids, out_weights, control_address):
    control = array_at(control_address, (_CONTROL_SIZE,), np.int64)
    shape = (control[_SAMPLES], control[_MAPS], control[_MAP_ROWS], control[_MAP_COLUMNS], control[_STORED])
    if control[_WIDE_IDS]:
        wide_ids = array_at(control[_IDS], shape, np.uint32)
        _work_with(worker, wide_ids, batch_indices, out_ids, out_weights, control_address)
    else:
        ids = array_at(control[_IDS], shape, np.uint16)
        _work_with(worker, ids, batch_indices, out_ids, out_weights, control_address)


@njit(cache=True, nogil=True)
def _draw_batch(batch_indices, out_ids, out_weights, control_address):
    array_at(control_address, (_CONTROL_SIZE,), np.int64)[_COUNTER] = 0
    _work(0, batch_indices, out_ids, out_weights, control_address)


@njit(cache=True, nogil=True, parallel=True)
def _draw_batch_parallel(batch_indices, out_ids, out_weights, control_address):
    control = array_at(control_address, (_CONTROL_SIZE,), np.int64)
    control[_COUNTER] = 0
    for worker in prange(control[_WORKERS]):
        _work(worker, batch_indices, out_ids, out_weights, control_address)
