"""Statistics of a label set: confidence, residual, and agreement with the images' classes."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from stl_offline.errors import InputError, counted
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.store import each_shard

_BINS = 10
# Of a token's classes by mass: those that the table names.
_RANKS = 8


@dataclass(frozen=True)
class Stats:
    """Counts and means over the tokens of ``samples`` images (all of the set's, or those of the shards read).

    histogram: tokens by confidence, (10,) counts of [0, 0.1) … [0.9, 1]; confidence, top_k_mass, residual: means;
    mass_by_rank: the mean probability of the best class, the second, …; over_half: the share of tokens whose best
    class has more than 0.5; agreement: the share of tokens whose best class is the image's; agreement_top_k: whose
    stored classes hold it; image_agreement: the share of images whose tokens' most frequent best class is it (all three
    None where images have no classes); classes_best, classes_stored: how many classes are some token's best, or stored
    at all; bytes_per_image: of the shards read, all told. Of labels with
    draws, a class's probability is its mass, `LabelMap.listed`.
    """

    shards: int
    samples: int
    tokens: int
    classes: int
    top_k: int
    histogram: tuple[int, ...]
    confidence: float
    top_k_mass: float
    mass_by_rank: tuple[float, ...]
    residual: float
    over_half: float
    agreement: float | None
    agreement_top_k: float | None
    image_agreement: float | None
    classes_best: int
    classes_stored: int
    bytes_per_image: float
    draws: int = 0


def measure(label_set: LabelSet, *, shards: int | None = None, workers: int = 0) -> Stats:
    """Statistics over all shards, or over ``shards`` of them, spread evenly over the set.

    Raises:
        InputError: fewer than one shard is asked for, or more than there are.
        FormatError: a shard is damaged, or two of those read hold the same key.
    """
    present = choose_shards(label_set, shards)
    spec = label_set.spec
    entries = spec.top_k + spec.draws
    total = _Sums(spec.num_classes, entries)

    def read(index: int) -> _Sums:
        return _Sums(spec.num_classes, entries).count(label_set.read_shard(index).listed())

    for part in each_shard(read, present, "stats", workers=workers):
        total.add(part)
    label_set.check_unique()
    tokens, own = total.tokens, label_set.spec.has_own_classes
    return Stats(
        shards=len(present),
        samples=total.samples,
        tokens=tokens,
        classes=label_set.spec.num_classes,
        top_k=spec.top_k,
        draws=spec.draws,
        histogram=tuple(total.histogram.tolist()),
        confidence=float(total.mass[0] / tokens),
        top_k_mass=float(total.mass.sum() / tokens),
        mass_by_rank=tuple((total.mass / tokens).tolist()),
        residual=float(total.residual / tokens),
        over_half=total.over_half / tokens,
        agreement=total.agreeing / tokens if own else None,
        agreement_top_k=total.agreeing_top_k / tokens if own else None,
        image_agreement=total.agreeing_images / total.samples if own else None,
        classes_best=int(total.best.sum()),
        classes_stored=int(total.stored.sum()),
        bytes_per_image=sum(label_set.shards[index].bytes for index in present) / total.samples,
    )


def check_own_classes(label_set: LabelSet) -> None:
    """Raise `InputError` where a set's images have no classes, so that labels cannot be compared with them."""
    if not label_set.spec.has_own_classes:
        raise InputError(f"the images of {label_set.place} have no classes, with which labels could be compared")


def choose_shards(label_set: LabelSet, shards: int | None) -> tuple[int, ...]:
    """All shards that are here, or ``shards`` of them, spread evenly. Raises InputError where there are not as many."""
    present = label_set.only_part().present
    if shards is None:
        return present
    if not 1 <= shards <= len(present):
        raise InputError(f"`shards` must lie between 1 and the {len(present)} shards that are here, got {shards}")
    return tuple(present[place * len(present) // shards] for place in range(shards))


def table(stats: Stats) -> list[tuple[str, str]]:
    """The statistics as lines of a name and a value."""
    tokens = stats.tokens
    lines = [
        ("images", f"{stats.samples:,} in {counted(stats.shards, 'shard')}, {stats.bytes_per_image:,.0f} bytes each"),
        ("tokens", f"{tokens:,}, {_stored(stats)} of {counted(stats.classes, 'class')}"),
        (
            "confidence" if not stats.draws else "first class",
            f"{stats.confidence:.4f} on average; {stats.over_half:.2%} of the tokens over 0.5",
        ),
        (
            "top-k mass" if not stats.draws else "mass",
            f"{stats.top_k_mass:.4f} ({', '.join(f'{mass:.4f}' for mass in stats.mass_by_rank[:_RANKS])})",
        ),
        ("residual", f"{stats.residual:.4f} left to the classes that are not stored"),
        ("classes seen", f"{stats.classes_best:,} as the best of a token, {stats.classes_stored:,} at all"),
        (
            "agreement",
            "none: the images have no classes"
            if stats.agreement is None
            else f"{stats.agreement:.2%} of the tokens name the image's class first, {stats.agreement_top_k:.2%} at "
            f"all; {stats.image_agreement:.2%} of the images do by most of their tokens",
        ),
    ]
    most = max(stats.histogram)
    for place, count in enumerate(stats.histogram):
        bar = "█" * round(40 * count / most)
        lines.append((f"{place / _BINS:.1f}–{(place + 1) / _BINS:.1f}", f"{count / tokens:7.2%} {bar}".rstrip()))
    return lines


def _stored(stats: Stats) -> str:
    best, drawn = f"the {stats.top_k} best", f"{stats.draws} drawn"
    return " and ".join([best] * bool(stats.top_k) + [drawn] * bool(stats.draws))


class _Sums:
    """Sums over tokens, which add up over shards."""

    def __init__(self, classes: int, top_k: int) -> None:
        self.samples = self.tokens = 0
        self.histogram = np.zeros(_BINS, dtype=np.int64)
        self.mass = np.zeros(top_k, dtype=np.float64)
        self.residual = 0.0
        self.over_half = self.agreeing = self.agreeing_top_k = self.agreeing_images = 0
        self.best = np.zeros(classes, dtype=bool)
        self.stored = np.zeros(classes, dtype=bool)

    def count(self, arrays: ShardArrays) -> "_Sums":
        n, k = len(arrays), arrays.class_ids.shape[-1]
        ids = arrays.class_ids.reshape(n, -1, k)
        mass = probabilities(arrays.logits, arrays.confidence).reshape(n, -1, k)
        confidence = mass[..., 0]
        own = arrays.class_id[:, None]
        self.samples, self.tokens = n, confidence.size
        bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
        self.histogram = np.bincount(bins.ravel(), minlength=_BINS)
        self.mass = mass.sum(axis=(0, 1), dtype=np.float64)
        self.residual = float(np.maximum(0, 1 - mass.sum(-1)).sum(dtype=np.float64))
        self.over_half = int((confidence > 0.5).sum())
        self.agreeing = int((ids[..., 0] == own).sum())
        self.agreeing_top_k = int((ids == own[..., None]).any(-1).sum())
        self.best[np.unique(ids[..., 0])] = True
        self.stored[np.unique(ids)] = True
        for row, class_id in zip(ids[..., 0], arrays.class_id.tolist(), strict=True):
            names, counts = np.unique(row, return_counts=True)
            self.agreeing_images += int(names[counts.argmax()] == class_id)
        return self

    def add(self, other: "_Sums") -> None:
        for name, value in vars(other).items():
            if value is other.best or value is other.stored:
                vars(self)[name] |= value
            else:
                vars(self)[name] += value


def to_json(stats: Stats) -> dict[str, Any]:
    """The statistics as a JSON object."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(stats).items()}
