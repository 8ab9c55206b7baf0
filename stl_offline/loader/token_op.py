"""Token targets as an FFCV operation: from the token cache's memory to (B, h, w, columns), in the same loader.

n: samples; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; h, w: the student's grid.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit, prange

from stl_offline.errors import InputError
from stl_offline.labels.cache import TokenCache
from stl_offline.loader.native import next_item
from stl_offline.targets import TokenTargets, relative_view_into, target_numbers, token_targets_into


class TokenDraw(Operation):
    """FFCV operation in the class field's place: gives each sample's token targets.

    Output: a pair, ids int32 and weights float32, each (B, h, w, columns). A sample without labels gets −1 and 0. It
    runs once a batch, and what it calls is compiled by this module, so FFCV need not compile it.
    """

    def __init__(self, targets: TokenTargets, cache: TokenCache, workers: int, seed: int) -> None:
        super().__init__()
        self.targets = targets
        # Plain arrays over the cache's mapped memory: numba has no type for memory maps.
        self._tables = tuple(
            np.asarray(table)
            for table in (cache.class_ids, cache.probabilities, cache.confidence, cache.views, cache.labelled)
        )
        self._numbers = target_numbers(targets, cache.num_classes)
        self._seed = np.uint64(seed % 2**64)
        self._epoch = np.uint64(0)
        self._views: np.ndarray | None = None
        self._map_index: np.ndarray | None = None
        # One of each for every worker, as `token_targets_into` wants them.
        self._scratch = (
            np.zeros((workers, cache.num_classes), dtype=np.float32),
            np.zeros((workers, cache.num_classes), dtype=np.int32),
            np.zeros((workers, *targets.grid, targets.kept), dtype=np.int32),
            np.zeros((workers, *targets.grid, targets.kept), dtype=np.float32),
            np.zeros((workers, *targets.grid), dtype=np.float32),
        )

    def set_epoch(self, epoch: int, views: np.ndarray, map_index: np.ndarray | None) -> None:
        """Give targets for these student views, float32 (n, 6), from these maps, int64 (n,) or all the first.

        No batch may be under way.

        Raises:
            InputError: map_index has another length or names a map that is not stored.
        """
        samples, maps = self._tables[0].shape[:2]
        if map_index is None:
            map_index = np.zeros(samples, dtype=np.int64)
        map_index = np.ascontiguousarray(map_index, dtype=np.int64)
        if map_index.shape != (samples,) or (samples and (map_index.min() < 0 or map_index.max() >= maps)):
            raise InputError(f"map_index must be {samples:,} numbers in 0 … {maps - 1}, got {map_index.shape}")
        self._views, self._map_index, self._epoch = views, map_index, np.uint64(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (*self.targets.grid, self.targets.columns)
        queries = (AllocationQuery(shape, np.dtype("i4")), AllocationQuery(shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        draw_batch = _draw_batch_parallel if len(self._scratch[0]) > 1 else _draw_batch

        def token_draw(batch_indices, destinations, _metadata, _storage_state):
            draw_batch(
                batch_indices,
                self._tables,
                self._views,
                self._map_index,
                self._numbers,
                self._seed,
                self._epoch,
                self._scratch,
                *destinations,
                np.zeros(1, dtype=np.int64),
            )
            return destinations

        return token_draw


@njit(cache=True, nogil=True)
def _work(worker, ids, tables, views, map_index, numbers, seed, epoch, scratch, out_ids, out_weights, counter):
    class_ids, probabilities, confidence, map_views, labelled = tables
    kind, ratio, uniform_residual, min_confidence, classes = numbers
    sums, touched, aligned_ids, aligned_probabilities, covered = scratch
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = next_item(counter)
        if place >= len(ids):
            break
        sample = ids[place]
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
            kind,
            ratio,
            uniform_residual,
            min_confidence,
            classes,
            seed,
            epoch,
            np.uint64(sample),
            sums[worker],
            touched[worker],
            aligned_ids[worker],
            aligned_probabilities[worker],
            covered[worker],
            out_ids[place],
            out_weights[place],
        )


@njit(cache=True, nogil=True)
def _draw_batch(ids, tables, views, map_index, numbers, seed, epoch, scratch, out_ids, out_weights, counter):
    _work(0, ids, tables, views, map_index, numbers, seed, epoch, scratch, out_ids, out_weights, counter)


@njit(cache=True, nogil=True, parallel=True)
def _draw_batch_parallel(ids, tables, views, map_index, numbers, seed, epoch, scratch, out_ids, out_weights, counter):
    for worker in prange(len(scratch[0])):
        _work(worker, ids, tables, views, map_index, numbers, seed, epoch, scratch, out_ids, out_weights, counter)
