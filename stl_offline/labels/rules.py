"""What the content of a label shard must be like: one table of rules, which every reader and writer of labels applies.

`ShardArrays` applies the rules for keys when it is built, and all others in `ShardArrays.check`, which decoding ends
with. Where only keys are read, `check_index` is called. The quick way from a q8 shard to the token cache, after a join
has read the keys, calls `check_views` and takes only cells that cannot break a rule; all others go the long way, and
are judged here.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell; K: all classes.
"""

import json
import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import NO_TEXT, FormatError
from stl_offline.labels.spec import ENCODINGS, LabelSpec

# What `_cell_fault` finds in a cell, by its number.
CELL_FAULTS = (
    "",
    "a class id is not below the class count",
    "a cell names a class twice",
    "a logit is not finite",
    "the logits of a cell do not fall",
    "a confidence is not within (0, 1]",
    "the probabilities of a cell sum to more than 1",
)
_CLASS_ID, _TWICE, _NOT_FINITE, _RISING, _CONFIDENCE, _SUM = range(1, len(CELL_FAULTS))

# Random crops lie within the image, and labels of other projects a few images' widths around it. Far larger numbers
# make float32 overflow where views are multiplied.
_LARGEST_VIEW = 1e4
_WHOLE = np.array([1, 0, 0, 0, 1, 0], dtype=np.float32)

# Of labels that went from f16 to q8, which keeps differences of logits only: the logits that f16 rounded are taken to
# be this large. Those of known classifiers are below 100.
_LARGEST_LOGIT = 256.0
# float32's rounding in the sum, and the second order of the bounds.
_SLACK = 1e-4


def check_keys(keys: Sequence[str]) -> None:
    """Raise FormatError where a key is empty, no path below a root, holds a control character or half of a surrogate
    pair, or is there twice."""
    for key in keys:
        # The first line is true of nearly all keys, and quick.
        if key.isprintable() and key and key[0] != "/" and ".." not in key:
            continue
        if not key or NO_TEXT.search(key) or key.startswith("/") or ".." in key.split("/"):
            raise FormatError(
                f"{key!r} is no key: it must be a path below the data set's root, of Unicode text without control "
                "characters"
            )
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))
        raise FormatError(f"the key {twice} is there twice")


def check_index(keys: Sequence[str], class_id: np.ndarray, spec: LabelSpec) -> None:
    """Raise FormatError where keys are wrong (`check_keys`), or an image's class_id (n,) is not below K."""
    check_keys(keys)
    check_class_id(class_id, spec)


def check_class_id(class_id: np.ndarray, spec: LabelSpec) -> None:
    """Raise FormatError where an image's class_id (n,) is not below K."""
    if class_id.max() >= spec.num_classes:
        raise FormatError(f"class_id {class_id.max()} is not below the {spec.num_classes} classes")


def check_views(keys: Sequence[object], views: np.ndarray, spec: LabelSpec) -> None:
    """Raise FormatError where a view of views (n, V, 6) is not finite, has no inverse or a number beyond ±10,000, or
    is not the whole image although the set's views are."""
    with np.errstate(over="ignore", invalid="ignore"):
        fine = views[..., 0] * views[..., 4] != views[..., 1] * views[..., 3]
        # NaN is not below anything.
        fine &= (np.abs(views) <= _LARGEST_VIEW).all(-1)
    if not fine.all():
        key = keys[int((~fine).any(-1).argmax())]
        raise FormatError(f"the view of {key} is not finite, is beyond ±{_LARGEST_VIEW:,.0f} or has no inverse")
    if spec.views["kind"] == "whole" and (other := (views != _WHOLE).any((1, 2))).any():
        raise FormatError(
            f"the view of {keys[int(other.argmax())]} is not the whole image, which the manifest names as its view"
        )


def sum_limit(spec: LabelSpec, k: int, encoding: str = "") -> tuple[float, float, float, float]:
    """(factor, slope, least, offset): how far the probabilities of a cell may sum beyond 1, from the set's bounds.

    encoding: of the cell, the set's by default; the class head's outputs are in f16 in every set.

    Rounding moves a confidence by a share of ``confidence_relative``, a probability by ``probability_relative`` or
    ``probability_absolute``, and each of the two logits that a probability depends on by ``logit_relative`` of itself.
    So the sum is at most

        factor · exp(slope · (max(|logit_1|, least) + max(|logit_k|, least))) + offset.
    """
    # The encoding's own rounding, too, where the manifest's bounds are those of another one.
    own = ENCODINGS[encoding or spec.encoding]
    theirs = spec.bounds if own is ENCODINGS[spec.encoding] else {}
    bounds = own | {name: max(value, own.get(name, 0.0)) for name, value in theirs.items()}
    slope = bounds.get("logit_relative", 0.0)
    factor = 1 + bounds.get("confidence_relative", 0.0) + bounds.get("probability_relative", 0.0) + _SLACK
    least = _LARGEST_LOGIT if slope and "probability_relative" in bounds else 0.0
    return factor, slope, least, k * bounds.get("probability_absolute", 0.0)


def least_sum_limit(spec: LabelSpec) -> float:
    """What `sum_limit` allows of any cell, whatever its logits."""
    factor, slope, least, offset = sum_limit(spec, spec.top_k)
    return factor * math.exp(slope * 2 * least) + offset


def check_cells(
    keys: Sequence[str],
    class_ids: np.ndarray,
    logits: np.ndarray,
    confidence: np.ndarray,
    spec: LabelSpec,
    encoding: str = "",
) -> None:
    """Raise FormatError where a cell has one of `CELL_FAULTS`; ``encoding``: as of `sum_limit`.

    Args:
        class_ids, logits: (n, V, Gh, Gw, k); confidence: (n, V, Gh, Gw); numbers as float16 or float32. Of the class
            head's answer (n, V, k) and (n, V).
    """
    n, k = len(keys), class_ids.shape[-1]
    is_half = logits.dtype == confidence.dtype == np.dtype("<f2")
    logits, confidence = (
        np.ascontiguousarray(values).view("<u2") if is_half else np.ascontiguousarray(values, "<f4")
        for values in (logits, confidence)
    )
    sample, fault = _first_fault(
        np.ascontiguousarray(class_ids).reshape(n, -1, k),
        logits.reshape(n, -1, k),
        confidence.reshape(n, -1),
        _half_values() if is_half else None,
        spec.num_classes,
        sum_limit(spec, k, encoding),
    )
    if fault:
        raise FormatError(f"the labels of {keys[sample]} cannot be used: {CELL_FAULTS[fault]}")


def check_confidence(keys: Sequence[str], confidence: np.ndarray) -> None:
    """Raise FormatError where a confidence (n, ...) that stands without top-k classes is not within (0, 1]."""
    wrong = ~((confidence > 0) & (confidence <= 1)).reshape(len(keys), -1).all(axis=1)
    if wrong.any():
        raise FormatError(f"the labels of {keys[int(wrong.argmax())]} cannot be used: {CELL_FAULTS[_CONFIDENCE]}")


def check_draws(keys: Sequence[str], draws: np.ndarray, class_ids: np.ndarray | None, spec: LabelSpec) -> None:
    """Raise FormatError where a drawn class (n, ..., S) is not below K, or is one of its cell's stored classes.

    Args:
        class_ids: (n, ..., k), the stored classes; None: there are none.
    """
    cells = draws[0, ..., 0].size
    if class_ids is None:
        class_ids = np.empty((len(keys), cells, 0), dtype=draws.dtype)
    draws, class_ids = (
        np.ascontiguousarray(ids).reshape(len(keys), cells, ids.shape[-1]) for ids in (draws, class_ids)
    )
    sample = _first_wrong_draw(draws, class_ids, spec.num_classes)
    if sample >= 0:
        raise FormatError(
            f"the labels of {keys[sample]} cannot be used: a drawn class is not below the class count, or is among the "
            "stored classes of its cell"
        )


def check_augmentation(keys: Sequence[str], records: Sequence[str], spec: LabelSpec) -> None:
    """Raise FormatError where an image's augmentation record is not JSON text of a list with an entry for each view."""
    for key, text in zip(keys, records, strict=True):
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"the augmentation record of {key} is no JSON: {error}") from error
        if not isinstance(entries, list) or len(entries) != spec.views_per_image:
            raise FormatError(f"the augmentation record of {key} is no list of {spec.views_per_image} entries")


@njit
def _first_wrong_draw(draws, class_ids, classes):
    for sample in range(len(draws)):
        for cell in range(draws.shape[1]):
            for place in range(draws.shape[2]):
                drawn = draws[sample, cell, place]
                if drawn >= classes:
                    return sample
                for entry in range(class_ids.shape[2]):
                    if class_ids[sample, cell, entry] == drawn:
                        return sample
    return -1


@njit(inner=True)
def _cell_fault(class_ids, logits, confidence, classes, limit):
    """The number of the first of `CELL_FAULTS` that a cell has, 0 for none.

    class_ids: (k,) integers; logits: (k,) float32; confidence: float32; classes: K; limit: of `sum_limit`.
    """
    if not 0 < confidence <= 1:
        return _CONFIDENCE
    stored = len(class_ids)
    for entry in range(stored):
        class_id = class_ids[entry]
        if class_id >= classes:
            return _CLASS_ID
        for earlier in range(entry):
            if class_ids[earlier] == class_id:
                return _TWICE
        if not -math.inf < logits[entry] < math.inf:
            return _NOT_FINITE
        if entry and logits[entry] > logits[entry - 1]:
            return _RISING
    total = last = confidence
    for entry in range(1, stored):
        # Entries fall: the others add at most this. Most cells end here without an exponential.
        if total + (stored - entry) * last <= 1:
            return 0
        last = confidence * np.float32(math.exp(logits[entry] - logits[0]))
        total += last
    if total <= 1:
        return 0
    factor, slope, least, offset = limit
    reach = max(abs(logits[0]), least) + max(abs(logits[stored - 1]), least)
    return _SUM if total > factor * math.exp(slope * reach) + offset else 0


@njit
def _first_fault(class_ids, logits, confidence, half, classes, limit):
    """(sample, fault) of the first cell with a fault; (-1, 0) where there is none.

    Compiled code does not know float16. Its numbers come as their bits, with ``half``: the float32 value of each of
    the 65,536; None where they come as float32.
    """
    samples, cells, stored = class_ids.shape
    numbers = np.empty(stored, dtype=np.float32)
    for sample in range(samples):
        for cell in range(cells):
            if half is None:
                best = confidence[sample, cell]
                for entry in range(stored):
                    numbers[entry] = logits[sample, cell, entry]
            else:
                best = half[confidence[sample, cell]]
                for entry in range(stored):
                    numbers[entry] = half[logits[sample, cell, entry]]
            fault = _cell_fault(class_ids[sample, cell], numbers, best, classes, limit)
            if fault:
                return sample, fault
    return -1, 0


@cache
def _half_values() -> np.ndarray:
    """float32 (65536,): the number that each pattern of 16 bits is as a float16."""
    return np.arange(1 << 16, dtype="<u2").view("<f2").astype(np.float32)
