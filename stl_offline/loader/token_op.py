"""Token targets as an FFCV operation: from the token caches' memory to (B, h, w, columns), in the same loader.

n: samples; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; h, w: the student's grid.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import carray, cfunc
from numba.core.ccallback import CFunc

from stl_offline.errors import InputError
from stl_offline.geometry import relative_view_into, window_of
from stl_offline.labels.cache import TokenCache
from stl_offline.loader.compiled_work import WORK_SIGNATURE, pointer, run_work
from stl_offline.loader.decoder import next_item
from stl_offline.targets import AlignScratch, TokenTargets, align_classes_into, draw_classes_into, drop_unsure

# The addresses of a cache's arrays, and their shape (n, V, Gh, Gw, k) without n.
_TABLES = ("class_ids", "probabilities", "confidence", "views", "labelled")
_CACHE = np.dtype([(name, np.int64) for name in (*_TABLES, "maps", "rows", "columns", "stored")])
# A batch: the addresses of arrays, sides of their shapes, and the settings of the targets.
_SCRATCH = ("sums", "touched", "aligned_ids", "aligned_probabilities", "covered")
_ARRAYS = ("caches", *("crops", "shown", "cache_index", "map_index"), *("ids", "out_ids", "out_weights", "counter"))
_SIDES = ("batch", "samples", "cache_count", "workers", "classes", "rows", "columns", "kept", "targets")
_JOB = np.dtype(
    [(name, np.int64) for name in (*_ARRAYS, *_SCRATCH, *_SIDES, "ratio")]
    + [("uniform_residual", np.bool_), ("best_only", np.bool_)]
    + [("min_confidence", np.float32), ("seed", np.uint64), ("epoch", np.uint64)]
)


class TokenDraw(Operation):
    """FFCV operation in the class field's place: gives each sample's token targets.

    Output: a pair, ids int32 and weights float32, each (B, h, w, columns). A sample without labels gets −1 and 0. It
    runs once a batch, and what it calls is compiled by this module, so FFCV need not compile it.

    ``caches`` are of the same images and classes; their grids, k and V may differ. An epoch says which cache and
    which of its maps each sample reads.
    """

    def __init__(self, targets: TokenTargets, caches: Sequence[TokenCache], workers: int, seed: int) -> None:
        super().__init__()
        self.targets = targets
        id_type = np.result_type(*(cache.class_ids for cache in caches))
        self._work = _work(id_type.type, targets.kind == "gumbel", targets.min_confidence > 0)
        self._workers = workers
        self._maps = np.array([cache.views.shape[1] for cache in caches])
        types = dict(zip(_TABLES, (id_type, np.float32, np.float32, np.float32, np.uint8), strict=True))
        # Compiled code knows arrays by their addresses alone, so they are kept here.
        self._tables = [
            {name: np.ascontiguousarray(getattr(cache, name), types[name]) for name in _TABLES} for cache in caches
        ]
        table = np.zeros(len(caches), dtype=_CACHE)
        for row, arrays in zip(table, self._tables, strict=True):
            _point_at(row, **arrays)
            row["maps"], row["rows"], row["columns"], row["stored"] = arrays["class_ids"].shape[1:]
        scratch = [AlignScratch.make(targets, caches[0].num_classes) for _ in range(workers)]
        self._shared = {"caches": table}
        for name, of_workers in zip(_SCRATCH, zip(*scratch, strict=True), strict=True):
            self._shared[name] = np.stack(of_workers)
        self._epoch: dict[str, np.ndarray] = {}
        job = self._job = np.zeros(1, dtype=_JOB)
        _point_at(job, **self._shared)
        job["cache_count"], job["workers"], job["classes"] = len(caches), workers, caches[0].num_classes
        job["rows"], job["columns"] = targets.grid
        job["kept"], job["targets"], job["ratio"] = targets.kept, targets.columns, targets.sampling_ratio
        job["uniform_residual"], job["best_only"] = targets.residual == "uniform", targets.kind == "argmax"
        job["min_confidence"], job["seed"] = targets.min_confidence, seed % 2**64

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
            crops, views: float32 (n, 6): what is decoded of each image, and what of it a student's tokens are shown
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
        crops, shown = (np.ascontiguousarray(array, np.float32) for array in (crops, views))
        self._epoch = {"crops": crops, "shown": shown, "cache_index": caches, "map_index": chosen}
        _point_at(self._job, **self._epoch)
        self._job["samples"], self._job["epoch"] = samples, epoch

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (*self.targets.grid, self.targets.columns)
        queries = (AllocationQuery(shape, np.dtype("i4")), AllocationQuery(shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        def token_draw(batch_indices, destinations, _metadata, _storage_state):
            ids = np.ascontiguousarray(batch_indices, np.int64)
            counter = np.zeros(1, dtype=np.int64)
            job = self._job.copy()
            _point_at(job, ids=ids, counter=counter, out_ids=destinations[0], out_weights=destinations[1])
            job["batch"] = len(ids)
            run_work(self._work, job, self._workers)
            return destinations

        return token_draw


def _point_at(record: np.ndarray, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        record[name] = array.ctypes.data


def _check_index(name: str, index: np.ndarray, samples: int, end: int) -> np.ndarray:
    index = np.ascontiguousarray(index, dtype=np.int64)
    if index.shape != (samples,) or (samples and (index.min() < 0 or index.max() >= end)):
        raise InputError(f"{name} must be {samples:,} numbers in 0 … {end - 1}, got {index.shape}")
    return index


@functools.cache
def _work(id_type: type, draws: bool, drops: bool) -> CFunc:
    """The compiled work on a `_JOB`; what a kind of targets does not need is not compiled.

    id_type: of class ids; draws: targets are drawn, not aligned; drops: tokens need some confidence.
    """

    @cfunc(WORK_SIGNATURE, cache=True)
    def work(worker, record):
        job = carray(record, 1, _JOB)[0]
        grid = (job.rows, job.columns)
        ids = carray(pointer(job.ids), job.batch, np.int64)
        caches = carray(pointer(job.caches), job.cache_count, _CACHE)
        crops = carray(pointer(job.crops), (job.samples, 6), np.float32)
        shown = carray(pointer(job.shown), (job.samples, 6), np.float32)
        cache_index = carray(pointer(job.cache_index), job.samples, np.int64)
        map_index = carray(pointer(job.map_index), job.samples, np.int64)
        all_ids = carray(pointer(job.out_ids), (job.batch, *grid, job.targets), np.int32)
        all_weights = carray(pointer(job.out_weights), (job.batch, *grid, job.targets), np.float32)
        counter = carray(pointer(job.counter), 1, np.int64)
        relative = np.empty(6, dtype=np.float64)
        while True:
            place = next_item(counter)
            if place >= job.batch:
                break
            sample = ids[place]
            out_ids = all_ids[place]
            out_weights = all_weights[place]
            cache = caches[cache_index[sample]]
            if carray(pointer(cache.labelled), job.samples, np.uint8)[sample] == 0:
                out_ids[:] = -1
                out_weights[:] = 0.0
                continue
            # The number of this map among all that the cache holds.
            number = sample * cache.maps + map_index[sample]
            maps = job.samples * cache.maps
            shape = (maps, cache.rows, cache.columns, cache.stored)
            class_ids = carray(pointer(cache.class_ids), shape, id_type)[number]
            probabilities = carray(pointer(cache.probabilities), shape, np.float32)[number]
            map_view = carray(pointer(cache.views), (maps, 6), np.float32)[number]
            relative_view_into(map_view, crops[sample], relative)
            window = window_of(relative)
            relative_view_into(map_view, shown[sample], relative)
            if draws:
                draw_classes_into(
                    class_ids,
                    probabilities,
                    relative,
                    window,
                    job.ratio,
                    job.uniform_residual,
                    job.classes,
                    job.seed,
                    job.epoch,
                    np.uint64(sample),
                    out_ids,
                    out_weights,
                )
            else:
                scratch = AlignScratch(
                    carray(pointer(job.sums), (job.workers, job.classes), np.float32)[worker],
                    carray(pointer(job.touched), (job.workers, job.classes), np.int32)[worker],
                    carray(pointer(job.aligned_ids), (job.workers, *grid, job.kept), np.int32)[worker],
                    carray(pointer(job.aligned_probabilities), (job.workers, *grid, job.kept), np.float32)[worker],
                    carray(pointer(job.covered), (job.workers, *grid), np.float32)[worker],
                )
                align_classes_into(
                    class_ids,
                    probabilities,
                    relative,
                    window,
                    job.ratio,
                    job.uniform_residual,
                    job.best_only,
                    scratch,
                    out_ids,
                    out_weights,
                )
            if drops:
                confidence = carray(pointer(cache.confidence), shape[:3], np.float32)[number]
                drop_unsure(confidence, relative, job.min_confidence, out_ids, out_weights)

    return work
