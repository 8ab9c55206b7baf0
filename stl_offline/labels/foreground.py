"""Whether a set's labels show where the object is: its tokens against the objects' masks.

No token was ever labelled by hand, so this is what "self-emerging" means in numbers (STL, arXiv 2401.03844, figure 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.stats import check_own_classes, choose_shards
from stl_offline.labels.store import each_shard

CONFIDENT = 0.5  # least confidence of a confident token
_BINS = 10
_POINTS = 8  # per cell and side, where a mask is looked up


@dataclass(frozen=True)
class Foreground:
    """Label maps against masks, over the images that have one.

    A token counts as inside the object by the share of its cell that the mask covers, and as outside by the rest.

    images: images with a mask; samples: all that were read.
    confident_inside, confident_outside: the share of the tokens inside and outside that name the image's own class
    with a confidence of at least 0.5.
    auroc: area under the ROC curve of a token's probability of the own class as a test of being inside, mean over the
    maps that have both (0.5: labels show nothing of the place; 1: every token inside is above every token outside).
    inside_by_confidence, right_by_confidence: of tokens with a confidence in [0, 0.1) … [0.9, 1], the number inside
    the object, and the share of these whose best class is the own one; NaN where there are none.
    calibration_error: mean of |that share − mean confidence| over the bins, weighted by their tokens.
    """

    images: int
    samples: int
    confident_inside: float
    confident_outside: float
    auroc: float
    inside_by_confidence: tuple[float, ...]
    right_by_confidence: tuple[float, ...]
    calibration_error: float

    @property
    def contrast(self) -> float:
        """Share of confident tokens inside over that outside; infinite where there are none outside."""
        return self.confident_inside / self.confident_outside if self.confident_outside else float("inf")


def measure_foreground(
    label_set: LabelSet, masks: Mapping[str, np.ndarray], *, shards: int | None = None, workers: int = 0
) -> Foreground:
    """Compare label maps, of whole images or of crops, with masks: key → bool (H, W), True inside the object.

    Images without a mask are left out and counted.

    Raises:
        InputError: no image has a mask, or a class; ``shards`` (as `measure` takes it) is out of range.
        FormatError: a shard is damaged.
    """
    check_own_classes(label_set)
    total = _Sums()
    for part in each_shard(
        lambda index: _Sums().count(label_set.read_shard(index), masks),
        choose_shards(label_set, shards),
        "foreground",
        workers=workers,
    ):
        total.add(part)
    label_set.check_unique()
    if not total.images:
        raise InputError(
            f"none of the {total.samples:,} images has a mask; keys look like {next(iter(label_set))!r}, "
            f"masks like {next(iter(masks), '')!r}"
        )
    inside, outside = (total.confident / np.maximum(total.tokens, 1e-9)).tolist()
    filled = np.maximum(total.bins, 1e-9)
    gaps = np.abs(total.right - total.confidence)
    return Foreground(
        images=total.images,
        samples=total.samples,
        confident_inside=inside,
        confident_outside=outside,
        auroc=total.area / total.maps if total.maps else float("nan"),
        inside_by_confidence=tuple(total.bins.tolist()),
        right_by_confidence=tuple(np.where(total.bins > 0, total.right / filled, np.nan).tolist()),
        calibration_error=float(gaps.sum() / max(total.bins.sum(), 1e-9)),
    )


def table(found: Foreground) -> list[tuple[str, str]]:
    """The measures as lines of a name and a value."""
    lines = [
        ("masks", f"{found.images:,} of {found.samples:,} images have one"),
        ("AUROC", f"{found.auroc:.3f} of a token's probability of the image's class (0.5: blind to the object)"),
        (
            "contrast",
            f"{found.contrast:.2f}: {found.confident_inside:.1%} of the tokens inside the objects are confident of the "
            f"image's class, {found.confident_outside:.1%} outside",
        ),
        ("calibration", f"{found.calibration_error:.3f} mean gap of confidence and accuracy inside the objects"),
    ]
    for place, (tokens, right) in enumerate(zip(found.inside_by_confidence, found.right_by_confidence, strict=True)):
        span = f"{place / _BINS:.1f}–{(place + 1) / _BINS:.1f}"
        if tokens:
            lines.append((span, f"right in {right:7.2%} of {tokens:,.0f} tokens inside the objects"))
    return lines


def to_json(found: Foreground) -> dict[str, Any]:
    """The measures as a JSON object; null where nothing was there to measure."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in vars(found).items()}
    values["contrast"] = found.contrast
    return {
        name: [_finite(each) for each in value] if isinstance(value, list) else _finite(value)
        for name, value in values.items()
    }


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def coverage(mask: np.ndarray, view: View, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(inside, outside), each (Gh, Gw): the share of each cell, under a view, that lies in the mask and beside it.

    mask: bool (H, W) over the whole image. Where a view leaves the image, a cell is neither.
    """
    height, width = grid
    v, u = np.meshgrid(*((np.arange(cells * _POINTS) + 0.5) / (cells * _POINTS) for cells in grid), indexing="ij")
    points = view(np.stack([u, v], -1).reshape(-1, 2))
    columns, rows = (np.floor(points[:, axis] * mask.shape[1 - axis]).astype(np.int64) for axis in (0, 1))
    seen = (columns >= 0) & (columns < mask.shape[1]) & (rows >= 0) & (rows < mask.shape[0])
    hit = seen & mask[rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1)]
    inside, present = (
        part.reshape(height, _POINTS, width, _POINTS).mean(axis=(1, 3), dtype=np.float64) for part in (hit, seen)
    )
    return inside, present - inside


def auroc(scores: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,) for n cells that count as inside and outside by weights; ties count
    half."""
    levels, place = np.unique(scores, return_inverse=True)
    positive = np.bincount(place, inside, len(levels))
    negative = np.bincount(place, outside, len(levels))
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (inside.sum() * outside.sum()))


class _Sums:
    """Sums over tokens, which add up over shards."""

    def __init__(self) -> None:
        self.images = self.samples = self.maps = 0
        self.area = 0.0
        # Tokens inside and outside, and the confident ones of the own class among them.
        self.tokens, self.confident = np.zeros(2), np.zeros(2)
        # By confidence, inside: tokens, sums of their confidences, and how many name the own class first.
        self.bins, self.confidence, self.right = np.zeros(_BINS), np.zeros(_BINS), np.zeros(_BINS)

    def count(self, arrays: ShardArrays, masks: Mapping[str, np.ndarray]) -> "_Sums":
        arrays = arrays.listed()
        grid = arrays.confidence.shape[2:]
        self.samples = len(arrays)
        for row, key in enumerate(arrays.keys):
            mask = masks.get(key)
            if mask is None:
                continue
            self.images += 1
            mass = probabilities(arrays.logits[row], arrays.confidence[row])
            own = arrays.class_ids[row] == arrays.class_id[row]
            for view in range(len(own)):
                inside, outside = coverage(mask, View.from_array(arrays.views[row, view]), grid)
                self._count_map(mass[view], own[view], inside.ravel(), outside.ravel())
        return self

    def _count_map(self, mass: np.ndarray, own: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> None:
        best, first = mass[..., 0].ravel(), own[..., 0].ravel()
        weights = np.stack([inside, outside])
        self.tokens += weights.sum(1)
        self.confident += (weights * (first & (best >= CONFIDENT))).sum(1)
        if inside.sum() > 0 and outside.sum() > 0:
            self.maps += 1
            self.area += auroc((mass * own).sum(-1).ravel(), inside, outside)
        bins = np.minimum((best * _BINS).astype(np.int64), _BINS - 1)
        for name, value in (("bins", inside), ("confidence", inside * best), ("right", inside * first)):
            vars(self)[name] += np.bincount(bins, value, _BINS)

    def add(self, other: "_Sums") -> None:
        for name, value in vars(other).items():
            vars(self)[name] += value
