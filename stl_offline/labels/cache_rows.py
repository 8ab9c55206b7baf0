"""From a label shard to rows of the token cache.

n: samples of the shard; V: views; cells: V·Gh·Gw, the cells of all maps of an image; k: classes of a cell; K: all.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.draws import bits_of, entries, pack_draws, pack_into
from stl_offline.labels.format import confidence_table, logit_table, read_stored
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.rules import check_views, least_sum_limit
from stl_offline.labels.spec import LabelSpec

# Samples that are computed at a time: their arrays stay in the processor's cache.
_PART = 64
_Q8 = ("views", "palette", "class_ranks", "confidence_steps", "logit_gaps")


class ViewsOf(NamedTuple):
    """Some of a shard's views, ``first`` up to ``last`` (not included), and where the first of them lies in a cache."""

    first: int
    last: int
    at: int

    @property
    def stored(self) -> slice:
        return slice(self.first, self.last)

    @property
    def cached(self) -> slice:
        return slice(self.at, self.at + self.last - self.first)


def place_shard(
    cache: dict[str, np.ndarray],
    label_set: LabelSet,
    index: int,
    samples: np.ndarray,
    rows: np.ndarray,
    views: ViewsOf,
) -> None:
    """Put the labels of the shard's ``rows``, some of their views, into the cache's rows ``samples``.

    Keys and images' classes, which a join has read and checked to find the rows, are not read again on the quick way.

    Raises:
        FormatError: the shard is damaged.
    """
    data = label_set.read_bytes(index)
    spec = label_set.spec
    if spec.container == "zarr" and (place := _quick_way(spec)) and place(cache, data, spec, samples, rows, views):
        return
    _place_arrays(cache, label_set.decode(index, data), samples, rows, views, spec.num_classes)


def _quick_way(spec: LabelSpec) -> Callable[..., bool] | None:
    """How a zarr shard's rows are placed without the arrays in between, where there is a way."""
    if spec.encoding == "q8" and spec.format_version == 1:
        return _place_q8
    others = (spec.top_k, spec.has_confidence, spec.class_top_k, spec.class_draws)
    return _place_draws if spec.encoding == "f16" and not any(others) else None


def _place_arrays(
    cache: dict[str, np.ndarray],
    shard: ShardArrays,
    samples: np.ndarray,
    rows: np.ndarray,
    views: ViewsOf,
    classes: int,
) -> None:
    # By row of the cache, a part at a time: written pages are written once, and what is computed stays small.
    order = np.argsort(samples)
    for start in range(0, len(order), _PART):
        part = order[start : start + _PART]
        to, of = (samples[part], views.cached), (rows[part], views.stored)
        if shard.class_ids.shape[-1]:
            cache["class_ids"][to] = shard.class_ids[of]
            cache["probabilities"][to] = probabilities(shard.logits[of], shard.confidence[of])
        if shard.confidence is not None:
            cache["confidence"][to] = shard.confidence[of]
        if shard.draws is not None:
            cache["draws"][to] = _packed(shard.draws[of], classes)
        if "head_ids" in cache:
            cache["head_ids"][to], cache["head_masses"][to] = _head(shard, of)
        cache["views"][to] = shard.views[of]
        cache["labelled"][samples[part]] = 1


def _packed(draws: np.ndarray, classes: int) -> np.ndarray:
    """Draws (m, V, Gh, Gw, S), each map packed on its own: (m, V, bytes)."""
    packed = pack_draws(draws.reshape(-1, *draws.shape[2:]), classes)
    return packed.reshape(*draws.shape[:2], -1)


def _head(shard: ShardArrays, rows: tuple[np.ndarray, slice]) -> tuple[np.ndarray, np.ndarray]:
    """The class head's answer for some rows (m,) and views (v): class ids and masses (m, v, c + s)."""
    if shard.head_ids is None:
        draws = shard.head_draws[rows]
        none = np.empty((*draws.shape[:-1], 0))
        return entries(none.astype(draws.dtype), none.astype(np.float32), draws)
    masses = probabilities(shard.head_logits[rows], shard.head_confidence[rows])
    return entries(shard.head_ids[rows], masses, None if shard.head_draws is None else shard.head_draws[rows])


def _place_draws(
    cache: dict[str, np.ndarray],
    data: bytes,
    spec: LabelSpec,
    samples: np.ndarray,
    rows: np.ndarray,
    views: ViewsOf,
) -> bool:
    """As `_place_q8`, of labels that are draws and nothing else."""
    try:
        stored = read_stored(data, spec, ("views", "draws"))
        check_views(range(len(stored["views"])), stored["views"], spec)
    except FormatError:
        return False
    draws = stored["draws"]
    if rows.max() >= len(draws) or draws.max() >= spec.num_classes:
        return False
    order = np.argsort(samples)
    maps = draws.reshape(len(draws), spec.views_per_image, -1)
    places = (rows[order], samples[order], (views.first, views.last, views.at))
    _pack_rows(maps, bits_of(spec.num_classes), *places, np.asarray(cache["draws"]))
    cache["views"][samples, views.cached] = stored["views"][rows, views.stored]
    cache["labelled"][samples] = 1
    return True


@njit
def _pack_rows(draws, bits, rows, samples, views, cache):
    first, last, at = views
    for place in range(len(rows)):
        for view in range(first, last):
            pack_into(draws[rows[place], view], bits, cache[samples[place], at + view - first])


def _place_q8(
    cache: dict[str, np.ndarray],
    data: bytes,
    spec: LabelSpec,
    samples: np.ndarray,
    rows: np.ndarray,
    views: ViewsOf,
) -> bool:
    """`_place_arrays` without the arrays in between; False where a rule may be broken, for the long way to judge."""
    try:
        stored = read_stored(data, spec, _Q8)
        check_views(range(len(stored["views"])), stored["views"], spec)
    except FormatError:
        return False
    ranks = stored["class_ranks"]
    n, k = len(ranks), spec.top_k
    cells = ranks[0].size // k
    if rows.max() >= n:
        return False
    target = np.full(n, -1, dtype=np.int64)
    target[rows] = samples
    gaps = stored["logit_gaps"].reshape(n, cells, k - 1) if k > 1 else np.empty((n, cells, 0), dtype=np.uint8)
    logits = logit_table()
    size, of_view = len(cache["labelled"]), math.prod(spec.grid)
    whole = _place(
        ranks.reshape(n, cells, k),
        gaps,
        stored["palette"],
        stored["confidence_steps"].reshape(n, cells),
        confidence_table().astype(np.float32),
        # What the one definition of a probability makes of each logit that there can be, the best one being 0.
        probabilities(np.stack([np.zeros_like(logits), logits], axis=-1), np.ones(len(logits)))[:, 1],
        (spec.num_classes, least_sum_limit(spec)),
        target,
        (views.first * of_view, views.last * of_view, views.at * of_view),
        np.asarray(cache["class_ids"]).reshape(size, -1, k),
        np.asarray(cache["probabilities"]).reshape(size, -1, k),
        np.asarray(cache["confidence"]).reshape(size, -1),
    )
    if not whole:
        return False
    # Images of equal content may share a row, which is placed for one of them.
    placed = target[rows]
    others = np.flatnonzero(placed != samples)
    for name in ("class_ids", "probabilities", "confidence") if len(others) else ():
        cache[name][samples[others], views.cached] = cache[name][placed[others], views.cached]
    cache["views"][samples, views.cached] = stored["views"][rows, views.stored]
    cache["labelled"][samples] = 1
    return True


@njit
def _place(
    ranks, gaps, palette, steps, confidences, shares, limits, target, wanted, class_ids, probabilities, confidence
):
    """Fill the cache's rows ``target`` (n), −1 for none. False where the shard may not be as an encoder writes it.

    limits: K, and what the probabilities of a cell may sum to at least. wanted: the first of a sample's cells to
    place, the one after the last, and where the first lies in the cache. No rule is judged here: what passes cannot
    break one, since gaps only fall and a list of different classes gives different ranks different classes.
    """
    samples, cells, k = ranks.shape
    classes, most = limits
    first, last, start = wanted
    listed = np.empty(cells * k, dtype=palette.dtype)
    last_seen = np.full(classes, -1, dtype=np.int64)
    at = 0
    for sample in range(samples):
        size = 0
        for cell in range(cells):
            for entry in range(k):
                size = max(size, np.int64(ranks[sample, cell, entry]) + 1)
        if size > cells * k or at + size > len(palette):
            return False
        running = np.int64(0)
        for number in range(size):
            # The sum wraps around in the palette's own dtype.
            listed[number] = running + np.int64(palette[at + number])
            running = np.int64(listed[number])
            if running >= classes or last_seen[running] == sample:
                return False
            last_seen[running] = sample
        at += size
        row = target[sample]
        for cell in range(cells):
            place = cell - first + start
            is_wanted = row >= 0 and first <= cell < last
            best = confidences[steps[sample, cell]]
            if best <= 0:
                return False
            total = 0
            mass = np.float32(0)
            for entry in range(k):
                rank = ranks[sample, cell, entry]
                for earlier in range(entry):
                    if ranks[sample, cell, earlier] == rank:
                        return False
                if entry:
                    total += gaps[sample, cell, entry - 1]
                    if total > 255:
                        return False
                mass += shares[total]
                if is_wanted:
                    class_ids[row, place, entry] = listed[rank]
                    probabilities[row, place, entry] = shares[total] * best
            if mass * best > most:
                return False
            if is_wanted:
                confidence[row, place] = best
    return at == len(palette)
