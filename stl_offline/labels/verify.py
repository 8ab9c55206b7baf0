"""Checks a label set completely, and reports each fault in one line."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stl_offline.errors import FormatError, StlError, counted
from stl_offline.labels.keys import find_duplicates
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import ShardRecord
from stl_offline.labels.store import CARD, MANIFEST, PARTIAL, SOME_SHARDS, each_shard


@dataclass(frozen=True)
class Report:
    """Result of `verify`: ``faults``, one line each, which names the file; ``notes``: what is unusual but no fault."""

    shards: int
    samples: int
    faults: tuple[str, ...]
    notes: tuple[str, ...]


def verify(label_set: LabelSet, *, workers: int = 0, found: Callable[[str], None] = lambda line: None) -> Report:
    """Read every shard that is here: size, checksum, every array and value, keys unique in the whole set.

    For a set in an object store, this checks the files in the store, not those in the local cache.

    Args:
        workers: shards checked at the same time; 0 means one per core.
        found: called with each fault as it is found.

    Raises:
        InputError: the store cannot be reached.
    """
    faults: list[str] = []
    hashes: dict[int, np.ndarray] = {}

    def note(line: str) -> None:
        faults.append(line)
        found(line)

    def read(index: int) -> str | np.ndarray:
        """What is wrong with a shard, or the hashes of its keys."""
        try:
            label_set.decode(index, label_set.read_bytes(index, fresh=True))
            return label_set.key_hashes(index)
        except FormatError as error:
            return _without_place(label_set, label_set.shards[index], error)

    results = each_shard(read, label_set.present, "verify", workers=workers)
    for index, result in zip(label_set.present, results, strict=True):
        if isinstance(result, str):
            note(result)
        else:
            hashes[index] = result
    for part in label_set.parts:
        _note_twice(part, {index: hashes[index] for index in part.present if index in hashes}, note)
    notes = []
    left = len(label_set.shards) - len(label_set.present)
    if left:
        notes.append(f"{counted(left, 'shard')} {'was' if left == 1 else 'were'} not pulled, and not looked at")
    known = {shard.name for shard in label_set.shards} | {MANIFEST, CARD, PARTIAL, SOME_SHARDS}
    for name in label_set.storage.names():
        if name not in known and not name.startswith(".git"):
            notes.append(f"{name} lies there and does not belong to the label set")
    return Report(len(label_set.present), len(label_set), tuple(faults), tuple(notes))


def _note_twice(part: LabelSet, hashes: dict[int, np.ndarray], note: Callable[[str], None]) -> None:
    """Note keys that two shards hold; ``hashes``: those of each whole shard's keys."""
    whole = list(hashes)
    twice = find_duplicates(list(hashes.values()), lambda position: part.read_index(whole[position]).keys)
    for key, first, second in twice.examples:
        names = [part.shards[whole[position]].name for position in (first, second)]
        note(f"{names[1]}: the key {key} is there twice, first in {names[0]}")
    if twice.count > len(twice.examples):
        note(f"{twice.count - len(twice.examples):,} more keys are there twice")


def _without_place(label_set: LabelSet, shard: ShardRecord, error: StlError) -> str:
    """The error's text after the shard's name, which stands first in every line."""
    where = f"{label_set.place}/{shard.name}"
    text = str(error).removeprefix("the shard ")
    return f"{shard.name}: {text.removeprefix(where).lstrip(': ')}"
