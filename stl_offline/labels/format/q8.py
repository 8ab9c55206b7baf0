"""The compact encoding: plain arithmetic on plain arrays, with bounded error.

An image's cells name few different classes, so each class is named once and the cells hold places in that list.
Probabilities fall steeply, so they are held as steps of their logarithm.

- ``class_ranks`` (n, V, Gh, Gw, k): places in the image's list of classes. ``draw_ranks`` (n, V, Gh, Gw, S) likewise,
  of drawn classes; the list is one for both.
- ``palette``: these lists one after the other, each as long as the image's greatest rank + 1. An entry is the
  difference to the one before it in its list (modulo the dtype; the first one to 0), so a running sum gives the ids.
  The order within a list is free; classes that are about as frequent stand together, by id, which packs best.
- ``confidence_steps`` (n, V, Gh, Gw): confidence = exp(−0.0088 · steps), rounded to float16.
- ``logit_gaps`` (n, V, Gh, Gw, k − 1), absent for k = 1: logit_i − logit_1 = −(5/128) · (gap_1 + … + gap_{i−1}),
  which float16 holds exactly. Rounded so that the *probability*, not the difference, is off by half a step at most.

Errors: exp(0.0088 / 2) and float16's rounding keep the confidence within 0.5 %; exp(5 / 256) keeps a probability
within 2 %, and where more than 255 steps would be needed it is below 5e-5 of the confidence, and stored as that.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

from functools import cache

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec

CONFIDENCE_STEP = 0.0088
LOGIT_STEP = 5 / 128
_MOST_STEPS = 255

_FAULTS = (
    "",
    "its classes are not in the palette",
    "the gaps of a cell sum to more than 255",
    "the palette holds more classes than the images name",
)


def to_q8(arrays: ShardArrays, spec: LabelSpec) -> dict[str, np.ndarray]:
    """What stands for ``class_ids``, ``logits``, ``confidence`` and ``draws`` of ``arrays``, by name."""
    n, k = len(arrays), spec.top_k
    named = arrays.class_ids
    if arrays.draws is not None:
        named = np.concatenate([named, arrays.draws], axis=-1)
    cells = named[0, ..., 0].size
    ranks = np.empty((n, named[0].size), dtype=spec.id_dtype)
    palette = np.empty(named.size, dtype=spec.id_dtype)
    # Draws alone name more classes, so that the list costs more: it is kept closer to the order of the ids.
    used = _rank_classes(named.reshape(n, -1), spec.num_classes, 1 if k else 2, ranks, palette)
    stored = {"palette": palette[:used]} | _split(ranks.reshape(named.shape), k, ("class_ranks", "draw_ranks"))
    if arrays.confidence is None:
        return stored
    steps = np.empty((n, cells), dtype=np.uint16)
    gaps = np.empty((n, cells, max(0, k - 1)), dtype=np.uint8)
    _quantize(
        arrays.logits.astype(np.float32, copy=False).reshape(n, cells, k),
        arrays.confidence.astype(np.float32, copy=False).reshape(n, cells),
        confidence_table().astype(np.float64),
        steps,
        gaps,
    )
    stored["confidence_steps"] = steps.reshape(arrays.confidence.shape)
    if k > 1:
        stored["logit_gaps"] = gaps.reshape(*arrays.confidence.shape, k - 1)
    return stored


def from_q8(stored: dict[str, np.ndarray], spec: LabelSpec) -> dict[str, np.ndarray]:
    """``class_ids``, ``logits`` (of each cell's best class: 0), ``confidence`` and ``draws``, as far as the set has
    them, numbers as float16; the inverse of `to_q8`.

    Raises:
        FormatError: the arrays contradict each other.
    """
    parts = [stored[name] for name in ("class_ranks", "draw_ranks") if name in stored]
    ranks = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    n, k = len(ranks), spec.top_k
    cells = ranks[0, ..., 0].size
    gaps = stored["logit_gaps"].reshape(n, cells, k - 1) if k > 1 else np.empty((n, cells, 0), dtype=np.uint8)
    named = np.empty((n, cells, ranks.shape[-1]), dtype=spec.id_dtype)
    logits = np.empty((n, cells, k), dtype=np.uint16)
    bits = logit_table().view("<u2")
    sample, fault = _restore(ranks.reshape(named.shape), gaps, stored["palette"], bits, named, logits)
    if fault:
        raise FormatError(f"sample {sample} of the shard is damaged: {_FAULTS[fault]}")
    found = _split(named.reshape(ranks.shape), k, ("class_ids", "draws"))
    if k:
        found["logits"] = logits.view("<f2").reshape(*ranks.shape[:-1], k)
    if "confidence_steps" in stored:
        found["confidence"] = confidence_table()[stored["confidence_steps"]]
    return found


def _split(values: np.ndarray, k: int, names: tuple[str, str]) -> dict[str, np.ndarray]:
    """The part of the top k and the part of the draws, along the last axis; those that are not empty."""
    parts = {names[0]: values[..., :k], names[1]: values[..., k:]}
    return {name: np.ascontiguousarray(part) for name, part in parts.items() if part.shape[-1]}


@cache
def confidence_table() -> np.ndarray:
    """The confidence of every number of steps: float16 (65536,)."""
    return np.exp(-CONFIDENCE_STEP * np.arange(65_536, dtype=np.float64)).astype("<f2")


@cache
def logit_table() -> np.ndarray:
    """The logit of every sum of gaps: float16 (256,)."""
    return (-LOGIT_STEP * np.arange(_MOST_STEPS + 1, dtype=np.float64) + 0.0).astype("<f2")


@njit
def _rank_classes(class_ids, classes, step, ranks, palette):
    """Fill ranks (n, entries) and the palettes' differences; gives how much of the palette is used."""
    counts = np.zeros(classes, dtype=np.int64)
    rank_of = np.zeros(classes, dtype=np.int64)
    order = np.empty(class_ids.shape[1], dtype=np.int64)
    used = 0
    for sample in range(len(class_ids)):
        size = 0
        for class_id in class_ids[sample]:
            if counts[class_id] == 0:
                order[size] = class_id
                size += 1
            counts[class_id] += 1
        # By the power of two (or of four) below the count, falling; then by id. Sorted as one number.
        for place in range(size):
            count = counts[order[place]] >> (step - 1)
            while count > 1:
                count >>= step
                order[place] -= 1 << 32
        order[:size].sort()
        before = 0
        for place in range(size):
            class_id = order[place] & 0xFFFFFFFF
            rank_of[class_id] = place
            counts[class_id] = 0
            palette[used + place] = class_id - before
            before = class_id
        for entry in range(class_ids.shape[1]):
            ranks[sample, entry] = rank_of[class_ids[sample, entry]]
        used += size
    return used


@njit
def _quantize(logits, confidence, confidences, steps, gaps):
    samples, cells, stored = logits.shape
    for sample in range(samples):
        for cell in range(cells):
            true = np.log(np.float64(confidence[sample, cell]))
            step = int(min(max(np.rint(-true / CONFIDENCE_STEP), 0.0), 65_535.0))
            steps[sample, cell] = step
            offset = np.log(confidences[step]) - true
            best = np.float64(logits[sample, cell, 0]) if stored else 0.0
            before = 0.0
            for entry in range(1, stored):
                total = np.rint((best - np.float64(logits[sample, cell, entry]) + offset) / LOGIT_STEP)
                total = min(max(total, before), 255.0)
                gaps[sample, cell, entry - 1] = int(total - before)
                before = total


@njit
def _restore(ranks, gaps, differences, logit_bits, class_ids, logits):
    samples, cells, stored = ranks.shape
    kept = logits.shape[2]
    palette = np.empty(cells * stored, dtype=class_ids.dtype)
    at = 0
    for sample in range(samples):
        size = 0
        for cell in range(cells):
            for entry in range(stored):
                size = max(size, ranks[sample, cell, entry] + 1)
        if size > len(palette) or at + size > len(differences):
            return sample, 1
        running = differences[at]
        palette[0] = running
        for place in range(1, size):
            # The sum wraps around in the palette's own dtype.
            palette[place] = running + differences[at + place]
            running = palette[place]
        at += size
        for cell in range(cells):
            total = 0
            for entry in range(stored):
                class_ids[sample, cell, entry] = palette[ranks[sample, cell, entry]]
                if entry >= kept:
                    continue
                if entry:
                    total += gaps[sample, cell, entry - 1]
                    if total > 255:
                        return sample, 2
                logits[sample, cell, entry] = logit_bits[total]
    if at != len(differences):
        return samples - 1, 3
    return -1, 0
