"""The labeler's answer for a whole view as a class target: distillation of the class head from a label set.

Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition" (ECCV 2022), store a labeler's best
classes for each crop and replay both; where only some classes are stored, they spread the rest evenly over all.

B: batch; K: classes; e: stored classes of an answer.
"""

from collections.abc import Sequence

import numpy as np

from stl_offline.errors import InputError
from stl_offline.labels.cache_file import TokenCache
from stl_offline.labels.spec import LabelSpec


def class_share(text: str) -> float:
    """The share of the labels in the class target: own → 0, labels → 1, mix:W → W.

    Raises:
        InputError: another text, or a W outside of [0, 1].
    """
    known = {"own": 0.0, "labels": 1.0}
    if text in known:
        return known[text]
    name, _, number = text.partition(":")
    try:
        share = float(number) if name == "mix" else -1.0
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise InputError(f"`class_target` must be own, labels, or mix:W with W in [0, 1]; got {text!r}")
    return share


def check_class_answers(specs: Sequence[LabelSpec]) -> None:
    """Raise InputError where a label set has no answer of the class head, and no grid of one token in its place."""
    for spec in specs:
        if not (spec.class_top_k or spec.class_draws or spec.grid == (1, 1)):
            raise InputError(
                "`class_target` needs label sets with the labeler's class answers; dump them with `class_top_k` or "
                "`class_draws`"
            )


def class_answers(
    caches: Sequence[TokenCache], samples: np.ndarray, cache_index: np.ndarray, map_index: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The labeler's class distributions for some samples.

    What neither stored classes nor draws account for is spread evenly over all classes.

    Args:
        samples, cache_index, map_index: int64 (B,): which map of which cache.

    Returns:
        float32 (B, K), rows sum to 1; bool (B,), whether the sample has labels (a row without them is of no use).
    """
    classes = caches[0].num_classes
    dense = np.zeros((len(samples), classes), dtype=np.float32)
    labelled = np.zeros(len(samples), dtype=bool)
    for row, (sample, number, view) in enumerate(zip(samples, cache_index, map_index, strict=True)):
        cache = caches[number]
        labelled[row] = cache.labelled[sample] > 0
        if cache.head_ids is not None:
            ids, masses = cache.head_ids[sample, view], cache.head_masses[sample, view]
        else:
            ids, masses = (part[0, 0] for part in cache.entries(int(sample), int(view)))
        np.add.at(dense[row], ids, masses)
    dense += np.maximum(0, 1 - dense.sum(axis=1, keepdims=True)) / np.float32(classes)
    return dense / dense.sum(axis=1, keepdims=True), labelled
