"""What a set may be worth to students: whether two views of an image agree on where its class is, and are right."""

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
_FLAT = 1e-6  # a standard deviation below it is that of a map without structure


@dataclass(frozen=True)
class Worth:
    """How well the views of an image agree on where its class is, and whether it is the class.

    samples: images that were read; pairs: consecutive views of an image that overlap; agreement: mean over these pairs
    of the correlation (Pearson) of the two views' probabilities of the image's class, at the same points of the image:
    1 where they show it at the same place; 0 at unrelated places, or everywhere alike; right: the share of images whose
    tokens give their class a higher mean probability than any other.
    """

    samples: int
    pairs: int
    agreement: float
    right: float

    @property
    def score(self) -> float:
        """agreement · right."""
        return self.agreement * self.right


def measure_worth(label_set: LabelSet, *, shards: int | None = None, workers: int = 0) -> Worth:
    """Of all shards, or of ``shards`` of them, as `measure` chooses them.

    Of the scores that were compared, this one ranked label sets most like the gains of students trained on them
    (tests/benchmarks/worth.py). It needs no masks. Labels that are wrong alike in all views escape it. Drawn classes
    are noise, which lowers it: compare sets with as many draws.

    Raises:
        InputError: the set holds one view per image; its images have no classes; no two views overlap; or ``shards`` is
            out of range.
        FormatError: a shard is damaged.
    """
    if label_set.spec.views_per_image < 2:
        raise InputError(
            f"{label_set.place} holds one view per image; what a set is worth is measured by whether two views agree, "
            "of labels that were made with `crops_per_image` of at least 2"
        )
    check_own_classes(label_set)
    parts = each_shard(
        lambda index: _agreements(label_set.read_shard(index), label_set.spec.num_classes),
        choose_shards(label_set, shards),
        "worth",
        workers=workers,
    )
    found, samples, right = [], 0, 0
    for count, agreements, rights in parts:
        samples += count
        found += agreements
        right += rights
    label_set.check_unique()
    if not found:
        raise InputError(f"no two consecutive views of an image in {label_set.place} overlap")
    return Worth(samples, len(found), float(np.mean(found)), right / samples)


def agreement(maps_2HW: np.ndarray, views: tuple[View, View]) -> float | None:
    """Correlation of two maps (2, Gh, Gw) at the points of the image that both views show, of 32 × 32.

    None where these are fewer than 16; 0 where a map is constant.
    """
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
    if min(first.std(), second.std()) < _FLAT:
        return 0.0
    return float(np.corrcoef(first, second)[0, 1])


def table(found: Worth) -> list[tuple[str, str]]:
    """The measure as a line of a name and a value."""
    return [
        (
            "worth",
            f"{found.score:.3f}: {found.agreement:.3f} correlation of two views' probabilities of the image's class at "
            f"the same points ({counted(found.pairs, 'pair')} of views) × {found.right:.1%} of images right",
        )
    ]


def to_json(found: Worth) -> dict[str, Any]:
    """The measure as a JSON object."""
    return asdict(found) | {"score": found.score}


def _agreements(arrays: ShardArrays, classes: int) -> tuple[int, list[float], int]:
    """Images, the agreement of each pair of views, and how many images are right."""
    arrays = arrays.listed()
    found, right = [], 0
    for row, own in enumerate(arrays.class_id.tolist()):
        mass, ids = probabilities(arrays.logits[row], arrays.confidence[row]), arrays.class_ids[row]
        right += int(np.bincount(ids.ravel(), mass.ravel(), classes).argmax() == own)
        maps = (mass * (ids == own)).sum(-1)
        views = [View.from_array(view) for view in arrays.views[row]]
        for first in range(len(views) - 1):
            value = agreement(maps[first : first + 2], (views[first], views[first + 1]))
            if value is not None:
                found.append(value)
    return len(arrays), found, right
