"""Token targets as an FFCV operation: from the token caches' memory to (B, h, w, columns), in the same loader.

n: samples; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; h, w: the student's grid.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit, prange

from stl_offline.errors import InputError
from stl_offline.labels.cache import TokenCache
from stl_offline.labels.relative import relative_view_into, window_of
from stl_offline.loader.native import next_item
from stl_offline.targets import TokenTargets, target_numbers, token_targets_into

# Code is compiled for a number of caches, which takes long: up to this many share theirs, the first one filling up.
_CACHES_COMPILED = 4


class TokenDraw(Operation):
    """FFCV operation in the class field's place: gives each sample's token targets.

    Output: a pair, ids int32 and weights float32, each (B, h, w, columns). A sample without labels gets −1 and 0. It
    runs once a batch, and what it calls is compiled by this module, so FFCV need not compile it.

    ``caches`` are of the same pictures and classes; their grids, k and V may differ. An epoch says which cache and
    which of its maps each sample reads.
    """

    def __init__(self, targets: TokenTargets, caches: Sequence[TokenCache], workers: int, seed: int) -> None:
        super().__init__()
        self.targets = targets
        padded = [*caches, *(caches[:1] * (-len(caches) % _CACHES_COMPILED))]
        self._tables = tuple(
            tuple(_plain(getattr(cache, name)) for cache in padded)
            for name in ("class_ids", "probabilities", "confidence", "views", "labelled")
        )
        classes = caches[0].num_classes
        self._numbers = target_numbers(targets, classes)
        self._seed = np.uint64(seed % 2**64)
        self._epoch = np.uint64(0)
        self._maps = np.array([cache.views.shape[1] for cache in caches])
        self._views: tuple[np.ndarray, np.ndarray] | None = None
        self._choice: tuple[np.ndarray, np.ndarray] | None = None
        # One of each for every worker, as `token_targets_into` wants them.
        self._scratch = (
            np.zeros((workers, classes), dtype=np.float32),
            np.zeros((workers, classes), dtype=np.int32),
            np.zeros((workers, *targets.grid, targets.kept), dtype=np.int32),
            np.zeros((workers, *targets.grid, targets.kept), dtype=np.float32),
            np.zeros((workers, *targets.grid), dtype=np.float32),
        )

    def set_epoch(
        self,
        epoch: int,
        crops: np.ndarray,
        views: np.ndarray,
        map_index: np.ndarray | None,
        cache_index: np.ndarray | None,
    ) -> None:
        """What the next batches give; none may be under way.

        Args:
            crops, views: float32 (n, 6): what is decoded of each picture, and what of it a student's tokens are shown
                in the end. They differ where pixels are moved after decoding.
            map_index, cache_index: int64 (n,): which map of which cache each sample reads; None: the first.

        Raises:
            InputError: an index has another length or names a map or a cache that is not there.
        """
        samples = len(crops)
        maps = self._maps
        zeros = np.zeros(samples, dtype=np.int64)
        caches = _check_index("cache_index", zeros if cache_index is None else cache_index, samples, len(maps))
        chosen = _check_index("map_index", zeros if map_index is None else map_index, samples, int(maps.max()))
        if (chosen >= maps[caches]).any():
            raise InputError(f"map_index names a map that its cache does not hold; they hold {maps.tolist()}")
        self._views, self._choice, self._epoch = (crops, views), (caches, chosen), np.uint64(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (*self.targets.grid, self.targets.columns)
        queries = (AllocationQuery(shape, np.dtype("i4")), AllocationQuery(shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        draw_batch = _draw_batch_parallel if len(self._scratch[0]) > 1 else _draw_batch

        def token_draw(batch_indices, destinations, _metadata, _storage_state):
            draw_batch(
                batch_indices,
                *self._tables,
                self._views,
                self._choice,
                self._numbers,
                self._seed,
                self._epoch,
                self._scratch,
                *destinations,
                np.zeros(1, dtype=np.int64),
            )
            return destinations

        return token_draw


def _plain(table: np.ndarray) -> np.ndarray:
    # Over a cache's mapped memory, as numba has no type for memory maps; read-only, so that all have the same type.
    table = np.asarray(table).view()
    table.flags.writeable = False
    return table


def _check_index(name: str, index: np.ndarray, samples: int, end: int) -> np.ndarray:
    index = np.ascontiguousarray(index, dtype=np.int64)
    if index.shape != (samples,) or (samples and (index.min() < 0 or index.max() >= end)):
        raise InputError(f"{name} must be {samples:,} numbers in 0 … {end - 1}, got {index.shape}")
    return index


# Each table is an argument of its own, a tuple with one array a cache: numba's parallel loops take no nested tuples.
@njit(cache=True, nogil=True)
def _work(
    worker,
    ids,
    class_ids,
    probabilities,
    confidence,
    map_views,
    labelled,
    views,
    choice,
    numbers,
    seed,
    epoch,
    scratch,
    out_ids,
    out_weights,
    counter,
):
    crops, shown = views
    caches, maps = choice
    kind, ratio, uniform_residual, min_confidence, classes = numbers
    sums, touched, aligned_ids, aligned_probabilities, covered = scratch
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = next_item(counter)
        if place >= len(ids):
            break
        sample = ids[place]
        cache = caches[sample]
        if labelled[cache][sample] == 0:
            out_ids[place] = -1
            out_weights[place] = 0.0
            continue
        chosen = maps[sample]
        map_view = map_views[cache][sample, chosen]
        relative_view_into(map_view, crops[sample], relative)
        window = window_of(relative)
        relative_view_into(map_view, shown[sample], relative)
        token_targets_into(
            class_ids[cache][sample, chosen],
            probabilities[cache][sample, chosen],
            confidence[cache][sample, chosen],
            relative,
            window,
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
def _draw_batch(
    ids,
    class_ids,
    probabilities,
    confidence,
    map_views,
    labelled,
    views,
    choice,
    numbers,
    seed,
    epoch,
    scratch,
    out_ids,
    out_weights,
    counter,
):
    _work(
        0,
        ids,
        class_ids,
        probabilities,
        confidence,
        map_views,
        labelled,
        views,
        choice,
        numbers,
        seed,
        epoch,
        scratch,
        out_ids,
        out_weights,
        counter,
    )


@njit(cache=True, nogil=True, parallel=True)
def _draw_batch_parallel(
    ids,
    class_ids,
    probabilities,
    confidence,
    map_views,
    labelled,
    views,
    choice,
    numbers,
    seed,
    epoch,
    scratch,
    out_ids,
    out_weights,
    counter,
):
    for worker in prange(len(scratch[0])):
        _work(
            worker,
            ids,
            class_ids,
            probabilities,
            confidence,
            map_views,
            labelled,
            views,
            choice,
            numbers,
            seed,
            epoch,
            scratch,
            out_ids,
            out_weights,
            counter,
        )
