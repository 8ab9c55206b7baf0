"""Token targets as an FFCV operation: from the token caches' memory to (B, h, w, T), in the same loader.

n: samples; B: batch; h, w: the student's grid; T: targets per token.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from stl_offline.compiled import read_only
from stl_offline.errors import InputError
from stl_offline.loader.threads import Workers
from stl_offline.targets import Filler, TokenLabels, Wanted, check_index


class _Plan(NamedTuple):
    """What each sample of an epoch is given: crops and shown, float32 (n, 6), are what is decoded of its image and
    what of it a student's tokens are shown in the end; cache_index and map_index, int64 (n,), name its map; class_ids,
    int64 (n,), its own class. With several crops of each sample n counts these, as `ViewCrop` numbers them."""

    crops: np.ndarray
    shown: np.ndarray
    cache_index: np.ndarray
    map_index: np.ndarray
    class_ids: np.ndarray


class TokenDraw(Operation):
    """FFCV operation in the class field's place: gives each sample's token targets.

    Output: a pair, ids int32 and weights float32, each (B, h, w, T). A sample without labels gets −1 and 0. It runs
    once per batch, and what it calls is compiled by this package, so FFCV need not compile it. An epoch names the cache
    and the map that each sample reads.

    Args:
        class_ids: (n,) the samples' own classes.
    """

    def __init__(self, labels: TokenLabels, workers: Workers, seed: int, class_ids: np.ndarray) -> None:
        super().__init__()
        self._shape = (*labels.targets.grid, labels.targets_per_token)
        self._class_ids = read_only(class_ids, np.int64)
        self._workers, self._seed = workers, seed
        self.set_labels(labels)
        self._plan: _Plan | None = None
        self._epoch = 0

    def set_labels(self, labels: TokenLabels) -> None:
        """What the next epochs read; no batch may be under way. They must give as many targets per token as before."""
        self._filler = Filler(labels, self._seed, len(self._workers))

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
            epoch: that of the samples' first crops; the others are of the epochs after it.
            crops, views: float32 (n, 6): what is decoded of each image, and what of it a student's tokens are shown
                in the end. They differ where pixels are moved after decoding.
            map_index, cache_index: int64 (n,): which map of which cache each sample reads; None: the first.

        Raises:
            InputError: an index has another length or names a map or a cache that is not there.
        """
        samples = len(crops)
        counts = np.array([maps.views.shape[1] for maps in self._filler.maps])
        zeros = np.zeros(samples, dtype=np.int64)
        caches = check_index("cache_index", zeros if cache_index is None else cache_index, samples, len(counts))
        chosen = check_index("map_index", zeros if map_index is None else map_index, samples, int(counts.max()))
        if (chosen >= counts[caches]).any():
            raise InputError(f"map_index names a map that its cache does not hold; they hold {counts.tolist()}")
        crops, shown = (read_only(array, np.float32) for array in (crops, views))
        repeats = samples // max(1, len(self._class_ids))
        self._plan = _Plan(crops, shown, caches, chosen, np.tile(self._class_ids, repeats))
        self._epoch = epoch

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, AllocationQuery]]:
        queries = (AllocationQuery(self._shape, np.dtype("i4")), AllocationQuery(self._shape, np.dtype("f4")))
        return replace(previous_state, jit_mode=True, shape=self._shape, dtype=np.dtype("i4")), queries

    def generate_code(self) -> Callable:
        def token_draw(batch_indices, destinations, _metadata, _storage_state):
            ids = read_only(batch_indices, np.int64)
            out_ids, out_weights = destinations
            if not self._filler.is_whole:
                out_ids.fill(-1)
                out_weights.fill(0.0)
            samples = max(1, len(self._class_ids))
            wanted = Wanted(read_only(ids % samples), *(read_only(of_all[ids]) for of_all in self._plan))
            self._filler.fill(wanted, self._epoch + ids // samples, out_ids, out_weights, self._workers.run)
            return destinations

        return token_draw
