"""Images whose token labels disagree with their class: what is most likely labelled wrongly in the data."""

import heapq
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stl_offline.errors import InputError, printable
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.stats import check_own_classes, choose_shards
from stl_offline.labels.store import each_shard

# In place of a probability of 0, of a class that no token of an image stores.
_LEAST = 1e-5


@dataclass(frozen=True)
class Suspect:
    """An image whose class is doubtful.

    score: log of the ratio of two probabilities, each the mean over the tokens of all views: that of the most probable
    other class, and that of the own class; positive where the other is more probable; suggestion: that other class, one
    of those that images have; shard, row: where its labels are stored.
    """

    key: str
    class_id: int
    suggestion: int
    score: float
    shard: int
    row: int


def find_suspects(label_set: LabelSet, count: int, *, shards: int | None = None, workers: int = 0) -> list[Suspect]:
    """The ``count`` images with the highest scores, the most doubtful first; fewer where the set holds fewer.

    Of all shards, or of ``shards`` of them, as `measure` chooses them.

    The labeler may have been trained on the same wrong classes: training that does not learn single images by heart
    (augmentation, smoothing, few epochs) still disagrees with them. Classes of the labeler that no image has, as
    where an ImageNet model labels images of a few classes, are left out.

    The difference of the two probabilities misses images of which the labeler is unsure but excludes the own class.
    Their ratio finds these, too (tests/benchmarks/suspects.py compares them). Confident learning (arXiv 1911.00068)
    ranks by the own class's probability.

    Raises:
        InputError: fewer than one image is asked for, ``shards`` is out of range, the set has a single class, or none
            of its images has a class.
        FormatError: a shard is damaged.
    """
    if count < 1:
        raise InputError(f"`suspects` must be at least 1, got {count}")
    check_own_classes(label_set)
    if label_set.spec.num_classes < 2:
        raise InputError(f"{label_set.place} has a single class, so that its labels cannot disagree with it")

    chosen = choose_shards(label_set, shards)
    unseen = np.ones(label_set.spec.num_classes, dtype=bool)
    for index in chosen:
        unseen[label_set.read_index(index).class_ids] = False
    if unseen.sum() > label_set.spec.num_classes - 2:  # images of one class: any other is as good as another
        unseen[:] = False

    def read(index: int) -> list[Suspect]:
        return heapq.nlargest(count, _score(label_set.read_shard(index), index, unseen), key=_rank)

    parts = each_shard(read, chosen, "suspects", workers=workers)
    found = heapq.nlargest(count, (suspect for part in parts for suspect in part), key=_rank)
    label_set.check_unique()
    return found


def table(label_set: LabelSet, suspects: list[Suspect]) -> list[str]:
    """A line per image: its score, key, class, and the class that its tokens show."""
    names = label_set.spec.class_names
    return [
        f"{suspect.score:+.3f}  {printable(suspect.key)}: class {printable(names[suspect.class_id])}, "
        f"tokens show {printable(names[suspect.suggestion])}"
        for suspect in suspects
    ]


def to_json(label_set: LabelSet, suspects: list[Suspect]) -> list[dict[str, Any]]:
    """The images as JSON objects, with the names of their classes."""
    names = label_set.spec.class_names
    return [
        asdict(suspect) | {"class_name": names[suspect.class_id], "suggestion_name": names[suspect.suggestion]}
        for suspect in suspects
    ]


def _rank(suspect: Suspect) -> tuple[float, int, int]:
    return suspect.score, -suspect.shard, -suspect.row


def _score(arrays: ShardArrays, shard: int, unseen: np.ndarray) -> list[Suspect]:
    """unseen: bool (K,), the classes that are no suggestion."""
    arrays = arrays.listed()
    mass = probabilities(arrays.logits, arrays.confidence)
    tokens = arrays.confidence[0].size
    found = []
    for row, (key, own) in enumerate(zip(arrays.keys, arrays.class_id.tolist(), strict=True)):
        means = np.bincount(arrays.class_ids[row].ravel(), mass[row].ravel(), len(unseen)) / tokens
        probability, means[own] = means[own], -1.0
        means[unseen] = -1.0
        other = int(means.argmax())
        score = np.log(means[other] + _LEAST) - np.log(probability + _LEAST)
        found.append(Suspect(key, own, other, float(score), shard, row))
    return found
