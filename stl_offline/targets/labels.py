"""Token targets of a batch from token caches, for the loader and for loops of one's own; neither torch nor FFCV.

n: samples of a cache; V: stored maps of each; Gh, Gw: a map's grid; k: its classes; K: classes; B: batch; h, w: the
student's grid, N = h·w tokens; T: targets per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from stl_offline.compiled import next_item, njit, read_only
from stl_offline.errors import InputError, JoinError
from stl_offline.geometry import View, relative_view_into, window_of
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.cache_file import TokenCache
from stl_offline.labels.draws import bits_of, expand_into
from stl_offline.labels.join import POLICIES
from stl_offline.labels.keys import KeyIndex
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.spec import check_use
from stl_offline.settings import RESIDUALS
from stl_offline.targets.kinds import AlignScratch, TokenTargets, align_classes_into, draw_classes_into, drop_unsure

# Calls a compiled function once per thread, each with its own arguments.
Runner = Callable[[Callable[..., None], Sequence[tuple]], None]


class Maps(NamedTuple):
    """One cache: class_ids uint16 or uint32 (n, V, Gh, Gw, k), probabilities float32 of that shape, confidence float32
    (n, V, Gh, Gw), draws uint8 (n, V, bytes), views float32 (n, V, 6), labelled uint8 (n,); without numbers where there
    is no such thing."""

    class_ids: np.ndarray
    probabilities: np.ndarray
    confidence: np.ndarray
    draws: np.ndarray
    views: np.ndarray
    labelled: np.ndarray

    @classmethod
    def of(cls, cache: TokenCache) -> "Maps":
        """As compiled code takes them."""
        absent = {"confidence": np.empty((0, 0, 0, 0)), "draws": np.empty((0, 0, 0))}
        types = cls(cache.class_ids.dtype, np.float32, np.float32, np.uint8, np.float32, np.uint8)
        arrays = {name: getattr(cache, name) for name in cls._fields}
        arrays |= {name: array for name, array in absent.items() if arrays[name] is None}
        return cls(*(read_only(arrays[name], dtype) for name, dtype in types._asdict().items()))


class Shown(NamedTuple):
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

    @classmethod
    def of(cls, cache: TokenCache, maps: Maps, targets: TokenTargets) -> "Shown":
        """For one thread."""
        shape = (*cache.grid, cache.top_k + cache.spec.draws) if cache.draws is not None else (0, 0, 0)
        ids, masses = np.empty(shape, maps.class_ids.dtype), np.empty(shape, np.float32)
        # The same memory twice: numba compiles functions anew for arrays that may be written.
        read = (read_only(ids[None, None]), read_only(masses[None, None]))
        if cache.draws is None:
            read = (maps.class_ids, maps.probabilities)
        return cls(cache.draws is not None, bits_of(cache.num_classes), not targets.is_drawn, ids, masses, *read)


class Wanted(NamedTuple):
    """What each place of a batch is given.

    samples: int64 (B,), −1 for none; crops, shown: float32 (B, 6), what is decoded of the image, and what of it the
    student's tokens are shown in the end; cache_index, map_index: int64 (B,), which map of which cache; class_ids:
    int64 (B,), the images' own classes, −1 where not needed.
    """

    samples: np.ndarray
    crops: np.ndarray
    shown: np.ndarray
    cache_index: np.ndarray
    map_index: np.ndarray
    class_ids: np.ndarray


@dataclass(frozen=True)
class TokenLabels:
    """Token labels as training reads them: which targets, of which caches.

    `TokenLoader` takes them for packed images. In a loop of one's own they are called with a batch's samples and views.

    Args:
        targets: which targets to give.
        cache: the labels, in the order of the images, or several caches, of which each sample reads one. Their grids, k
            and V may differ.
        keys: of the cache's samples, where samples are given by key; `TokenLabels.of` fills it.
        missing: samples whose key has no label: "error", or "skip" (they get no targets).

    Raises:
        InputError: no cache, or caches of differing class counts.

    Example:
        ::

            labels = TokenLabels.of("labels", grid=(7, 7), kind="soft", m=5)
            ids, weights = labels(["n01440764/a.jpg"], [View.crop(0.1, 0.2, 0.5, 0.6)], epoch=3)  # (1, 49, 5) each
    """

    targets: TokenTargets
    cache: TokenCache | Sequence[TokenCache]
    keys: KeyIndex | None = None
    missing: str = "error"

    def __post_init__(self) -> None:
        if not self.caches:
            raise InputError("token targets need at least one token cache, got none")
        counts = sorted({cache.num_classes for cache in self.caches})
        check_use([cache.spec for cache in self.caches], self.targets.residual, self.targets.min_confidence)
        if len(counts) > 1:
            raise InputError(
                f"token caches must be of one class list, got caches of {' and '.join(map(str, counts))} classes"
            )
        if self.missing not in POLICIES:
            raise InputError(f"missing must be one of {', '.join(POLICIES)}, got {self.missing!r}")

    @classmethod
    def of(
        cls,
        labels: LabelSet | str | Path,
        grid: tuple[int, int],
        kind: str = "gumbel",
        *,
        missing: str = "error",
        folder: str | Path | None = None,
        **options: Any,
    ) -> Self:
        """Labels of a label set for samples named by their keys, without packed images.

        Fills the token cache in the label set's own order where that was not done yet. Whether images have changed
        since they were labelled is not checked; `build_token_cache` does so.

        Args:
            labels: the label set, or its place.
            grid: the student's token grid (h, w); kind, options: as of `TokenTargets`.
            missing: as above; folder: as of `build_token_cache`.

        Raises:
            StlError: a label set that is not there or damaged, or a setting out of its range.
        """
        targets = TokenTargets(kind, grid, **options)
        label_set = labels if isinstance(labels, LabelSet) else open_label_set(labels)
        parts = [label_set.read_index(shard) for shard in label_set.parts[0].present]
        keys = [key for part in parts for key in part.keys]
        hashes = np.concatenate([part.content_hashes for part in parts])
        cache = build_token_cache(label_set, keys, hashes, label_set.spec.class_names, folder=folder)
        return cls(targets, cache, KeyIndex.of(keys), missing)

    @property
    def caches(self) -> tuple[TokenCache, ...]:
        """The caches, also where there is one."""
        return tuple(self.cache) if isinstance(self.cache, Sequence) else (self.cache,)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.caches[0].num_classes

    @property
    def targets_per_token(self) -> int:
        """T. Labels with draws leave no probability over, which their classes would have to be listed for."""
        stored = (cache.class_ids.shape[-1] if cache.draws is None else 0 for cache in self.caches)
        return self.targets.targets_per_token(max(stored))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The label sets' class list."""
        return self.caches[0].spec.class_names

    def rows(self, samples: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
        """Places in the cache of samples named by key or by their place: int64 (B,), −1 for a sample without label.

        Raises:
            JoinError: keys without labels, unless ``missing`` is "skip".
            InputError: a place outside the cache, or keys where there are none to compare with.
        """
        if len(samples) and isinstance(samples[0], str):
            if self.keys is None:
                raise InputError("samples are named by keys, but these token labels have none; use `TokenLabels.of`")
            rows = self.keys.rows(samples)
            if self.missing == "error" and (rows < 0).any():
                absent = [samples[place] for place in np.flatnonzero(rows < 0)]
                raise JoinError(
                    f"{len(absent)} of {len(samples)} samples have no label, such as {absent[0]!r}; "
                    '`missing="skip"` trains on them without token labels'
                )
            return rows
        rows = np.asarray(samples, dtype=np.int64)
        if rows.ndim != 1 or (len(rows) and (rows.min() < -1 or rows.max() >= len(self.caches[0]))):
            raise InputError(f"samples must be one row of numbers in 0 … {len(self.caches[0]) - 1}, or keys")
        return rows

    def stored_views(self, samples: Sequence[str] | Sequence[int] | np.ndarray, epoch: int) -> np.ndarray | None:
        """The crops that a label set of crops was made from, one for each sample, in turn: float32 (B, 6).

        Training on them replays the labels as they are stored. A sample without label gets NaN, and may be given so to
        the targets. None for a label set of whole images, which fits any crop.

        Raises:
            InputError: several caches, whose crops differ; or as `rows`.
        """
        if len(self.caches) > 1:
            raise InputError(
                f"these token labels are of {len(self.caches)} caches, each with crops of its own; take one"
            )
        (cache,) = self.caches
        if cache.spec.views["kind"] != "random":
            return None
        rows = self.rows(samples)
        views = cache.views[rows, epoch % cache.views.shape[1]]
        views[(rows < 0) | (cache.labelled[rows] == 0)] = np.nan
        return views

    def __call__(
        self,
        samples: Sequence[str] | Sequence[int] | np.ndarray,
        views: np.ndarray | Sequence[View],
        epoch: int = 0,
        *,
        seed: int = 0,
        map_index: np.ndarray | None = None,
        cache_index: np.ndarray | None = None,
        class_ids: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token targets of a batch.

        Args:
            samples: (B,) keys, or places in the cache.
            views: float32 (B, 6), or views: what the student sees of each image; of a sample without label anything.
            epoch, seed: drawn targets are a pure function of these and the sample's place.
            map_index, cache_index: int64 (B,): which map of which cache; by default map ``epoch`` mod V of the first.
            class_ids: int64 (B,): the images' own classes, for targets whose residual is "class".

        Returns:
            ids int64 (B, N, T) and weights float32 (B, N, T), as `token_cross_entropy` takes them. A sample without
            label has ids of −1 and weights of 0.

        Raises:
            JoinError, InputError: as `rows`; or views or indexes that do not fit.
        """
        rows = self.rows(samples)
        shown = _as_rows(views)
        if shown.shape != (len(rows), 6):
            raise InputError(f"{len(rows)} samples need as many views of six numbers, got {shown.shape}")
        counts = np.array([cache.views.shape[1] for cache in self.caches])
        caches = check_index("cache_index", 0 if cache_index is None else cache_index, len(rows), len(counts))
        own = epoch % counts[caches] if map_index is None else map_index
        maps = check_index("map_index", own, len(rows), int(counts.max()))
        if (maps >= counts[caches]).any():
            raise InputError(f"map_index names a map that its cache does not hold; they hold {counts.tolist()}")
        is_labelled = rows >= 0
        for number, cache in enumerate(self.caches):
            mine = is_labelled & (caches == number)
            is_labelled[mine] = cache.labelled[rows[mine]] != 0
        unknown = np.flatnonzero(is_labelled & ~np.isfinite(shown).all(axis=1))
        if len(unknown):
            raise InputError(f"views are six finite numbers; that of {samples[unknown[0]]!r} is {shown[unknown[0]]}")
        own = np.full(len(rows), -1)
        if self.targets.residual == "class":
            if class_ids is None:
                raise InputError('`residual="class"` needs the classes of the images: give them as class_ids')
            own = check_index("class_ids", class_ids, len(rows), self.num_classes)
        shape = (len(rows), *self.targets.grid, self.targets_per_token)
        ids, weights = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        wanted = Wanted(read_only(rows, np.int64), shown, shown, caches, maps, read_only(own, np.int64))
        Filler(self, seed).fill(wanted, epoch, ids, weights)
        flat = (len(rows), self.targets.tokens, self.targets_per_token)
        return ids.reshape(flat).astype(np.int64), weights.reshape(flat)


class Filler:
    """Fills batches with the targets of some labels, on one or several threads.

    Args:
        seed: of drawn targets; threads: how many `fill` may use.
    """

    def __init__(self, labels: TokenLabels, seed: int, threads: int = 1) -> None:
        targets = self._targets = labels.targets
        self.maps = [Maps.of(cache) for cache in labels.caches]
        self.is_whole = all(maps.labelled.all() for maps in self.maps)
        self._seed = np.uint64(seed % 2**64)
        residual = RESIDUALS.index(targets.residual)
        self._settings = (targets.sampling_ratio, residual, np.float32(targets.min_confidence))
        self._classes = labels.num_classes
        sources = zip(labels.caches, self.maps, strict=True)
        self._shown = [[Shown.of(*source, targets) for _ in range(threads)] for source in sources]
        self._scratch = []
        if not targets.is_drawn:
            self._scratch = [AlignScratch.make(targets, labels.num_classes) for _ in range(threads)]

    def fill(
        self,
        wanted: Wanted,
        epoch: int | np.ndarray,
        out_ids: np.ndarray,
        out_weights: np.ndarray,
        run: Runner | None = None,
    ) -> None:
        """Write targets into int32 and float32 (B, h, w, T); rows of samples without labels stay as they are.

        epoch: what drawn targets are a function of, beside the seed and the sample; one for all, or int64 (B,).
        """
        epochs = read_only(np.broadcast_to(epoch, len(wanted.samples)), np.uint64)
        for number, maps in enumerate(self.maps):
            first = (np.zeros(1, dtype=np.int64), number, maps)
            common = (wanted, *self._settings, out_ids, out_weights)
            if self._targets.is_drawn:
                last = (self._classes, self._seed, epochs)
                work, arguments = _draw, [(*first, shown, *common, *last) for shown in self._shown[number]]
            else:
                best_only = self._targets.best_only
                each = zip(self._shown[number], self._scratch, strict=True)
                work, arguments = _align, [(*first, shown, *common, best_only, scratch) for shown, scratch in each]
            if run is None:
                work(*arguments[0])
            else:
                run(work, arguments)


def check_index(name: str, index: np.ndarray | int, samples: int, end: int) -> np.ndarray:
    """An index as compiled code takes it, int64 (samples,); raises `InputError` for another shape or number."""
    index = read_only(np.broadcast_to(index, samples) if np.ndim(index) == 0 else index, np.int64)
    if index.shape != (samples,) or (samples and (index.min() < 0 or index.max() >= end)):
        raise InputError(f"{name} must be {samples:,} numbers in 0 … {end - 1}, got {index.shape}")
    return index


def _as_rows(views: np.ndarray | Sequence[View]) -> np.ndarray:
    """Views as float32 (B, 6), as compiled code takes them."""
    if len(views) and isinstance(views[0], View):
        views = np.stack([view.matrix.ravel() for view in views])
    return read_only(views, np.float32)


@njit
def _draw(
    counter, number, maps, shown, wanted, ratio, residual, min_confidence, out_ids, out_weights, classes, seed, epochs
):
    """Targets that are drawn, of the places of a batch that read cache ``number``; run by every thread."""
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = _next_place(counter, number, maps, wanted)
        if place < 0:
            break
        sample = wanted.samples[place]
        choice = wanted.map_index[place]
        window = _look_at(maps, wanted, place, relative)
        row, view = _show(maps, shown, sample, choice)
        draw_classes_into(
            shown.class_ids[row, view],
            shown.probabilities[row, view],
            relative,
            window,
            ratio,
            residual,
            wanted.class_ids[place],
            classes,
            seed,
            epochs[place],
            np.uint64(sample),
            out_ids[place],
            out_weights[place],
        )
        if min_confidence > 0:
            drop_unsure(maps.confidence[sample, choice], relative, min_confidence, out_ids[place], out_weights[place])


@njit
def _align(
    counter, number, maps, shown, wanted, ratio, residual, min_confidence, out_ids, out_weights, best_only, scratch
):
    """Targets that hold the mixture or its best class, as `_draw`."""
    relative = np.empty(6, dtype=np.float64)
    while True:
        place = _next_place(counter, number, maps, wanted)
        if place < 0:
            break
        sample = wanted.samples[place]
        choice = wanted.map_index[place]
        window = _look_at(maps, wanted, place, relative)
        row, view = _show(maps, shown, sample, choice)
        align_classes_into(
            shown.class_ids[row, view],
            shown.probabilities[row, view],
            relative,
            window,
            ratio,
            residual,
            wanted.class_ids[place],
            best_only,
            scratch,
            out_ids[place],
            out_weights[place],
        )
        if min_confidence > 0:
            drop_unsure(maps.confidence[sample, choice], relative, min_confidence, out_ids[place], out_weights[place])


@njit(inline=True)
def _next_place(counter, number, maps, wanted):
    """The next place in the batch whose sample reads cache ``number`` and has labels there, or −1."""
    while True:
        place = next_item(counter)
        if place >= len(wanted.samples):
            return -1
        sample = wanted.samples[place]
        if sample >= 0 and wanted.cache_index[place] == number and maps.labelled[sample] != 0:
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
def _look_at(maps, wanted, place, relative):
    """The student's view on a place's map into ``relative``, float64 (6,); gives the window of the map."""
    map_view = maps.views[wanted.samples[place], wanted.map_index[place]]
    relative_view_into(map_view, wanted.crops[place], relative)
    window = window_of(relative)
    relative_view_into(map_view, wanted.shown[place], relative)
    return window
