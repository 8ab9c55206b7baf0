"""Choosing labels: by key, by pattern, or drawn at random, reading as little of the label set as possible."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.suspects import find_suspects

_MAGIC = frozenset("*?[")


@dataclass(frozen=True, order=True)
class Place:
    """Where a label is stored: shard, and row within the shard."""

    shard: int
    row: int


@dataclass(frozen=True)
class Choice:
    """places: in the order shown; found: number of labels that match the keys, all labels where no keys were given."""

    places: tuple[Place, ...]
    found: int

    @property
    def shards(self) -> tuple[int, ...]:
        """The shards that hold them."""
        return tuple(sorted({place.shard for place in self.places}))


def choose_labels(label_set: LabelSet, keys: Sequence[str], samples: int, seed: int) -> Choice:
    """Choose labels.

    Args:
        label_set: only its keys are read, and without ``keys`` no shard at all.
        keys: exact keys, or patterns with ``*``, ``?`` and ``[…]``. Exact keys are always chosen.
        samples: how many to draw at random, among the matches of the patterns if there are any.
        seed: of the draw.

    Raises:
        InputError: fewer than one sample.
        JoinError: a key or a pattern matches no label.
    """
    if samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    draw = np.random.default_rng(seed)
    if not keys:
        chosen = draw.choice(len(label_set), min(samples, len(label_set)), replace=False)
        return Choice(tuple(_place(label_set, int(position)) for position in np.sort(chosen)), len(label_set))
    named: list[Place] = []
    fitting: list[Place] = []
    open_keys = dict.fromkeys(keys)
    patterns = [key for key in open_keys if _MAGIC & set(key)]
    fruitless = set(patterns)
    for place, key in _walk(label_set):
        if key in open_keys:
            named.append(place)
            del open_keys[key]
            fruitless.discard(key)
        elif fits := [pattern for pattern in patterns if fnmatchcase(key, pattern)]:
            fitting.append(place)
            fruitless.difference_update(fits)
        if not open_keys:
            break
    missing = [key for key in open_keys if key not in patterns or key in fruitless]
    if missing:
        raise JoinError(
            f"{len(missing):,} of the keys asked for fit no label of {label_set.place}, for example {missing[0]!r}; "
            "keys are paths below the data set's root, as list(labels) gives them"
        )
    room = max(0, samples - len(named))
    drawn = draw.choice(len(fitting), min(room, len(fitting)), replace=False) if fitting else []
    chosen = sorted(named + [fitting[int(number)] for number in drawn])
    return Choice(tuple(chosen), len(named) + len(fitting))


def choose_suspects(label_set: LabelSet, count: int) -> Choice:
    """The images whose tokens disagree most with their class, the most doubtful first. Reads every shard."""
    places = tuple(Place(suspect.shard, suspect.row) for suspect in find_suspects(label_set, count))
    return Choice(places, len(label_set))


def _place(label_set: LabelSet, position: int) -> Place:
    for index in label_set.present:
        samples = label_set.shards[index].samples
        if position < samples:
            return Place(index, position)
        position -= samples
    raise InputError(f"the label set {label_set.place} holds no label number {position}")


def _walk(label_set: LabelSet) -> Iterator[tuple[Place, str]]:
    for shard in label_set.present:
        for row, key in enumerate(label_set.read_index(shard).keys):
            yield Place(shard, row), key
