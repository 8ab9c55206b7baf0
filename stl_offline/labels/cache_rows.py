"""From a label shard to rows of the token cache.

n: samples of the shard; V: views; cells: V·Gh·Gw, the cells of all maps of an image; k: classes of a cell; K: all.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.draws import entries, pack_draws
from stl_offline.labels.format import confidence_table, logit_table, read_stored
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.rules import check_views, least_sum_limit
from stl_offline.labels.spec import LabelSpec

# Samples that are computed at a time: their arrays stay in the processor's cache.
_PART = 64
_Q8 = ("views", "palette", "class_ranks", "confidence_steps", "logit_gaps")


def place_shard(
    cache: dict[str, np.ndarray], label_set: LabelSet, index: int, samples: np.ndarray, rows: np.ndarray
) -> None:
    """Put the labels of the shard's ``rows`` into the cache's rows ``samples``.

    Keys and images' classes, which a join has read and checked to find the rows, are not read again on the quick way.

    Raises:
        FormatError: the shard is damaged.
    """
    data = label_set.read_bytes(index)
    spec = label_set.spec
    is_quick = spec.encoding == "q8" and spec.container == "zarr" and spec.format_version == 1
    if is_quick and _place_q8(cache, data, spec, samples, rows):
        return
    _place_arrays(cache, label_set.decode(index, data), samples, rows, spec.num_classes)


def _place_arrays(
    cache: dict[str, np.ndarray], shard: ShardArrays, samples: np.ndarray, rows: np.ndarray, classes: int
) -> None:
    # By row of the cache, a part at a time: written pages are written once, and what is computed stays small.
    order = np.argsort(samples)
    for start in range(0, len(order), _PART):
        part = order[start : start + _PART]
        to, of = samples[part], rows[part]
        if shard.class_ids.shape[-1]:
            cache["class_ids"][to] = shard.class_ids[of]
            cache["probabilities"][to] = probabilities(shard.logits[of], shard.confidence[of])
        if shard.confidence is not None:
            cache["confidence"][to] = shard.confidence[of]
        if shard.draws is not None:
            _pack(cache["draws"], to, shard.draws[of], classes)
        if "head_ids" in cache:
            cache["head_ids"][to], cache["head_masses"][to] = _head(shard, of)
        cache["views"][to] = shard.views[of]
        cache["labelled"][to] = 1


def _pack(cache: np.ndarray, rows: np.ndarray, draws: np.ndarray, classes: int) -> None:
    """Draws (m, V, Gh, Gw, S) into the cache's rows (m,), each map on its own."""
    packed = pack_draws(draws.reshape(-1, *draws.shape[2:]), classes)
    cache[rows] = packed.reshape(len(rows), draws.shape[1], -1)


def _head(shard: ShardArrays, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class head's answer for some rows (m,): class ids and masses (m, V, c + s)."""
    if shard.head_ids is None:
        draws = shard.head_draws[rows]
        none = np.empty((*draws.shape[:-1], 0))
        return entries(none.astype(draws.dtype), none.astype(np.float32), draws)
    masses = probabilities(shard.head_logits[rows], shard.head_confidence[rows])
    return entries(shard.head_ids[rows], masses, None if shard.head_draws is None else shard.head_draws[rows])


def _place_q8(
    cache: dict[str, np.ndarray], data: bytes, spec: LabelSpec, samples: np.ndarray, rows: np.ndarray
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
    size = len(cache["labelled"])
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
        np.asarray(cache["class_ids"]).reshape(size, cells, k),
        np.asarray(cache["probabilities"]).reshape(size, cells, k),
        np.asarray(cache["confidence"]).reshape(size, cells),
    )
    if not whole:
        return False
    cache["views"][samples] = stored["views"][rows]
    cache["labelled"][samples] = 1
    return True


@njit
def _place(ranks, gaps, palette, steps, confidences, shares, limits, target, class_ids, probabilities, confidence):
    """Fill the cache's rows ``target`` (n), −1 for none. False where the shard may not be as an encoder writes it.

    limits: K, and what the probabilities of a cell may sum to at least. No rule is judged here: what passes cannot
    break one, since gaps only fall and a list of different classes gives different ranks different classes.
    """
    samples, cells, k = ranks.shape
    classes, most = limits
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
        for place in range(size):
            # The sum wraps around in the palette's own dtype.
            listed[place] = running + np.int64(palette[at + place])
            running = np.int64(listed[place])
            if running >= classes or last_seen[running] == sample:
                return False
            last_seen[running] = sample
        at += size
        row = target[sample]
        for cell in range(cells):
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
                if row >= 0:
                    class_ids[row, cell, entry] = listed[rank]
                    probabilities[row, cell, entry] = shares[total] * best
            if mass * best > most:
                return False
            if row >= 0:
                confidence[row, cell] = best
    return at == len(palette)
