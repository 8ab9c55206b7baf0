"""What a set may be worth to students: whether two views of an image agree on where its class is."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from stl_offline.errors import InputError, counted
from stl_offline.geometry import View
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.stats import check_own_classes, choose_shards
from stl_offline.labels.store import each_shard

_SIDE = 32
# Where maps are looked up: (32 · 32, 2) points (x, y) of the image, in unit coordinates.
_POINTS = (np.stack(np.meshgrid(np.arange(_SIDE), np.arange(_SIDE)), -1).reshape(-1, 2) + 0.5) / _SIDE
_LEAST = 16  # points that two views must have in common


@dataclass(frozen=True)
class Worth:
    """How well the views of an image agree.

    samples: images that were read; pairs: consecutive views of an image that overlap; covariance: mean over these pairs
    of the covariance of the two views' probabilities of the image's class, at the same points of the image. Its root is
    the part of the standard deviation over an image that both views share: at most 0.5; 0 where views show the class at
    unrelated places, everywhere alike, or not at all. Drawn classes leave the mean as it is: views are drawn
    independently.
    """

    samples: int
    pairs: int
    covariance: float

    @property
    def score(self) -> float:
        """The root of the covariance, with its sign: a probability."""
        return float(np.copysign(np.sqrt(abs(self.covariance)), self.covariance))


def measure_worth(label_set: LabelSet, *, shards: int | None = None, workers: int = 0) -> Worth:
    """Of all shards, or of ``shards`` of them, as `measure` chooses them.

    Of the scores that were compared, this one ranked label sets most like the gains of students trained on them
    (tests/benchmarks/worth.py). It needs no masks. Labels that are wrong alike in all views escape it.

    Raises:
        InputError: the set holds one view per image; its images have no classes; no two views overlap; or ``shards`` is
            out of range.
        FormatError: a shard is damaged.
    """
    if label_set.spec.views_per_image < 2:
        raise InputError(
            f"{label_set.place} holds one view per image; what a set is worth is measured by whether two views agree: "
            "label the same images, or some of them, with `--views 2`"
        )
    check_own_classes(label_set)
    parts = each_shard(
        lambda index: _covariances(label_set.read_shard(index)),
        choose_shards(label_set, shards),
        "worth",
        workers=workers,
    )
    found, samples = [], 0
    for count, covariances in parts:
        samples += count
        found += covariances
    label_set.check_unique()
    if not found:
        raise InputError(f"no two consecutive views of an image in {label_set.place} overlap")
    return Worth(samples, len(found), float(np.mean(found)))


def covariance(maps_2HW: np.ndarray, views: tuple[View, View]) -> float | None:
    """Of two maps (2, Gh, Gw), at the points of the image that both views show, of 32 × 32; None for fewer than 16."""
    size = np.array(maps_2HW.shape[:0:-1])
    inside, values = np.ones(len(_POINTS), dtype=bool), []
    for map_HW, view in zip(maps_2HW, views, strict=True):
        places = view.inverse()(_POINTS)
        inside &= ((places >= 0) & (places < 1)).all(axis=1)
        columns, rows = np.clip((places * size).astype(np.int64), 0, size - 1).T
        values.append(map_HW[rows, columns])
    if inside.sum() < _LEAST:
        return None
    first, second = (each[inside].astype(np.float64) for each in values)
    return float(((first - first.mean()) * (second - second.mean())).mean())


def table(found: Worth) -> list[tuple[str, str]]:
    """The measure as a line of a name and a value, and what it is."""
    return [
        (
            "worth",
            f"{found.score:.3f} of probability: how much of the class's place two views of an image share "
            f"({counted(found.pairs, 'pair')} of views, 0 to 0.5); it compares label sets of the same images",
        )
    ]


def to_json(found: Worth) -> dict[str, Any]:
    """The measure as a JSON object."""
    return asdict(found) | {"score": found.score}


def _covariances(arrays: ShardArrays) -> tuple[int, list[float]]:
    arrays = arrays.listed()
    found = []
    for row, own in enumerate(arrays.class_id.tolist()):
        mass = probabilities(arrays.logits[row], arrays.confidence[row])
        maps = (mass * (arrays.class_ids[row] == own)).sum(-1)
        views = [View.from_array(view) for view in arrays.views[row]]
        for first in range(len(views) - 1):
            value = covariance(maps[first : first + 2], (views[first], views[first + 1]))
            if value is not None:
                found.append(value)
    return len(arrays), found
