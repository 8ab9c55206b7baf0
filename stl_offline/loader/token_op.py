"""Token targets as an FFCV operation: from the token caches' memory to (B, h, w, T), in the same loader.

n: samples; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; B: batch; h, w: the student's
grid; T: targets per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from stl_offline.compiled import njit, read_only
from stl_offline.errors import InputError
from stl_offline.geometry import relative_view_into, window_of
from stl_offline.labels.cache import TokenCache
from stl_offline.labels.draws import bits_of, expand_into
from stl_offline.labels.spec import check_use
from stl_offline.loader.decoder import next_item
from stl_offline.loader.threads import Workers
from stl_offline.targets import AlignScratch, TokenTargets, align_classes_into, draw_classes_into, drop_unsure


@dataclass(frozen=True)
class TokenLabels:
    """What a loader makes token targets from.

    targets: which targets to give; cache: the labels, in the .beton's order, or several caches, of which each sample
    reads one. Their grids, k and V may differ.

    Raises:
        InputError: no cache, or caches of differing class counts.
    """

    targets: TokenTargets
    cache: TokenCache | Sequence[TokenCache]

    def __post_init__(self) -> None:
        if not self.caches:
            raise InputError("token targets need at least one token cache, got none")
        counts = sorted({cache.num_classes for cache in self.caches})
        check_use([cache.spec for cache in self.caches], self.targets.residual, self.targets.min_confidence)
        if len(counts) > 1:
            raise InputError(
                f"token caches must be of one class list, got caches of {' and '.join(map(str, counts))} classes"
            )

    @property
    def caches(self) -> tuple[TokenCache, ...]:
        """The caches, also where there is one."""
        return tuple(self.cache) if isinstance(self.cache, Sequence) else (self.cache,)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.caches[0].num_classes


class _Maps(NamedTuple):
    """One cache: class_ids uint16 or uint32 (n, V, Gh, Gw, k), probabilities float32 of that shape, confidence float32
    (n, V, Gh, Gw), draws uint8 (n, V, bytes), views float32 (n, V, 6), labelled uint8 (n,); without numbers where there
    is no such thing."""

    class_ids: np.ndarray
    probabilities: np.ndarray
    confidence: np.ndarray
    draws: np.ndarray
    views: np.ndarray
    labelled: np.ndarray


class _Shown(NamedTuple):
    """What targets are made from: the cache's own class_ids and probabilities, or, ``expanded``, those of one map at a
    time, whose draws are put beside its top k. ids, masses: that memory, to write (Gh, Gw, k + S); bits: of a draw;
    merges: whether each class is to be named once."""

    expanded: bool
    bits: int
    merges: bool
    ids: np.ndarray
    masses: np.ndarray
    class_ids: np.ndarray
    probabilities: np.ndarray


class _Plan(NamedTuple):
    """What each sample of an epoch is given: crops and shown, float32 (n, 6), are what is decoded of its image and
    what of it a student's tokens are shown in the end; cache_index and map_index, int64 (n,), name its map."""

    crops: np.ndarray
    shown: np.ndarray
    cache_index: np.ndarray
    map_index: np.ndarray


class TokenDraw(Operation):
    """FFCV operation in the class field's place: gives each sample's token targets.

    Output: a pair, ids int32 and weights float32, each (B, h, w, T). A sample without labels gets −1 and 0. It runs
    once per batch, and what it calls is compiled by this package, so FFCV need not compile it. An epoch names the cache
    and the map that each sample reads.
    """

    def __init__(self, labels: TokenLabels, workers: Workers, seed: int) -> None:
        super().__init__()
        targets = self.targets = labels.targets
        self._workers = workers
        self._maps = [_maps_of(cache) for cache in labels.caches]
        self._is_whole = all(maps.labelled.all() for maps in self._maps)
        self._plan: _Plan | None = None
        self._epoch = np.uint64(0)
        self._seed = np.uint64(seed % 2**64)
        self._settings = (targets.sampling_ratio, targets.residual == "uniform", np.float32(targets.min_confidence))
        self._classes = labels.num_classes
        sources = zip(labels.caches, self._maps, strict=True)
        self._shown = [[_shown(*source, targets) for _ in range(len(workers))] for source in sources]
        self._scratch = []
        if not targets.is_drawn:
            self._scratch = [AlignScratch.make(targets, labels.num_classes) for _ in range(len(workers))]

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
        counts = np.array([maps.views.shape[1] for maps in self._maps])
        zeros = np.zeros(samples, dtype=np.int64)
        caches = _check_index("cache_index", zeros if cache_index is None else cache_index, samples, len(counts))
        chosen = _check_index("map_index", zeros if map_index is None else map_index, samples, int(counts.max()))
        if (chosen >= counts[caches]).any():
            raise InputError(f"map_index names a map that its cache does not hold; they hold {counts.tolist()}")
        crops, shown = (read_only(array, np.float32) for array in (crops, views))
        self._plan = _Plan(crops, shown, caches, chosen)
        self._epoch = np.uint64(epoch)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        shape = (*self.targets.grid, self.targets.targets_per_token)
        queries = (AllocationQuery(shape, np.dtype("i4")), AllocationQuery(shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        def token_draw(batch_indices, destinations, _metadata, _storage_state):
            ids = read_only(batch_indices, np.int64)
            out_ids, out_weights = destinations
            if not self._is_whole:
                out_ids.fill(-1)
                out_weights.fill(0.0)
            for number, maps in enumerate(self._maps):
                items = (np.zeros(1, dtype=np.int64), ids, number)
                common = (self._plan, *self._settings, out_ids, out_weights)
                if self.targets.is_drawn:
                    last = (self._classes, self._seed, self._epoch)
                    arguments = [(*items, maps, shown, *common, *last) for shown in self._shown[number]]
                    self._workers.run(_draw, arguments)
                else:
                    each = zip(self._shown[number], self._scratch, strict=True)
                    arguments = [(*items, maps, shown, *common, self.targets.best_only, own) for shown, own in each]
                    self._workers.run(_align, arguments)
            return destinations

        return token_draw


def _maps_of(cache: TokenCache) -> _Maps:
    absent = {"confidence": np.empty((0, 0, 0, 0)), "draws": np.empty((0, 0, 0))}
    types = _Maps(cache.class_ids.dtype, np.float32, np.float32, np.uint8, np.float32, np.uint8)
    arrays = {name: getattr(cache, name) for name in _Maps._fields}
    arrays |= {name: array for name, array in absent.items() if arrays[name] is None}
    return _Maps(*(read_only(arrays[name], dtype) for name, dtype in types._asdict().items()))


def _shown(cache: TokenCache, maps: _Maps, targets: TokenTargets) -> _Shown:
    shape = (*cache.grid, cache.top_k + cache.spec.draws) if cache.draws is not None else (0, 0, 0)
    ids, masses = np.empty(shape, maps.class_ids.dtype), np.empty(shape, np.float32)
    # The same memory twice: numba compiles functions anew for arrays that may be written.
    read = (read_only(ids[None, None]), read_only(masses[None, None]))
    if cache.draws is None:
        read = (maps.class_ids, maps.probabilities)
    return _Shown(cache.draws is not None, bits_of(cache.num_classes), not targets.is_drawn, ids, masses, *read)


def _check_index(name: str, index: np.ndarray, samples: int, end: int) -> np.ndarray:
    index = read_only(index, np.int64)
    if index.shape != (samples,) or (samples and (index.min() < 0 or index.max() >= end)):
        raise InputError(f"{name} must be {samples:,} numbers in 0 … {end - 1}, got {index.shape}")
    return index


@njit
def _draw(
    counter, ids, number, maps, shown, plan, ratio, uniform, min_confidence, out_ids, out_weights, classes, seed, epoch
):
    """Targets that are drawn, of the samples of a batch that read cache ``number``; run by every worker."""
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = _next_place(counter, ids, number, maps, plan)
        if place < 0:
            break
        sample = ids[place]
        choice = plan.map_index[sample]
        window = _look_at(maps, plan, sample, relative)
        row, view = _show(maps, shown, sample, choice)
        draw_classes_into(
            shown.class_ids[row, view],
            shown.probabilities[row, view],
            relative,
            window,
            ratio,
            uniform,
            classes,
            seed,
            epoch,
            np.uint64(sample),
            out_ids[place],
            out_weights[place],
        )
        if min_confidence > 0:
            drop_unsure(maps.confidence[sample, choice], relative, min_confidence, out_ids[place], out_weights[place])


@njit
def _align(
    counter, ids, number, maps, shown, plan, ratio, uniform, min_confidence, out_ids, out_weights, best_only, scratch
):
    """Targets that hold the mixture or its best class, as `_draw`."""
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = _next_place(counter, ids, number, maps, plan)
        if place < 0:
            break
        sample = ids[place]
        choice = plan.map_index[sample]
        window = _look_at(maps, plan, sample, relative)
        row, view = _show(maps, shown, sample, choice)
        align_classes_into(
            shown.class_ids[row, view],
            shown.probabilities[row, view],
            relative,
            window,
            ratio,
            uniform,
            best_only,
            scratch,
            out_ids[place],
            out_weights[place],
        )
        if min_confidence > 0:
            drop_unsure(maps.confidence[sample, choice], relative, min_confidence, out_ids[place], out_weights[place])


@njit(inline=True)
def _next_place(counter, ids, number, maps, plan):
    """The next place in the batch whose sample reads cache ``number`` and has labels there, or −1."""
    while True:
        place = next_item(counter)
        if place >= len(ids):
            return -1
        sample = ids[place]
        if plan.cache_index[sample] == number and maps.labelled[sample] != 0:
            return place


@njit(inline=True)
def _show(maps, shown, sample, choice):
    """Where in ``shown`` a sample's map is: expanded into it, if it has draws."""
    if not shown.expanded:
        return sample, choice
    expand_into(
        maps.class_ids[sample, choice],
        maps.probabilities[sample, choice],
        maps.draws[sample, choice],
        shown.bits,
        shown.merges,
        shown.ids,
        shown.masses,
    )
    return np.int64(0), np.int64(0)


@njit(inline=True)
def _look_at(maps, plan, sample, relative):
    """The student's view on a sample's map into ``relative``, float64 (6,); gives the window of the map."""
    map_view = maps.views[sample, plan.map_index[sample]]
    relative_view_into(map_view, plan.crops[sample], relative)
    window = window_of(relative)
    relative_view_into(map_view, plan.shown[sample], relative)
    return window
