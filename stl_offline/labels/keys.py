"""Keys of many images: compared by hash, renamed, and why the keys of images and labels do not match.

Hashes take a hundredth of the memory of a dictionary of the keys.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from stl_offline.errors import InputError

_EXAMPLES = 3
# Fewer than these are compared key by key; more can only be counted by hash.
_COMPARED = 1000
# Of keys that do not match: how many are tried against a rule, and how many folders and endings make rules.
_TRIED_KEYS = 1000
_TRIED_NAMES = 4


@dataclass(frozen=True)
class Duplicates:
    """Keys that occur more than once: the number of surplus entries, and a few as (key, first list, other list)."""

    count: int
    examples: tuple[tuple[str, int, int], ...]


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """uint64 (n,): xxh3 of each key's UTF-8. Raises InputError where a key has none."""
    try:
        return np.fromiter((xxhash.xxh3_64_intdigest(key.encode()) for key in keys), dtype=np.uint64, count=len(keys))
    except UnicodeEncodeError as error:
        raise InputError(
            f"the key {error.object!r} is not Unicode text (it holds half of a surrogate pair, as file names that are "
            "not UTF-8 give); rename the image"
        ) from error


def find_duplicates(hashes: Sequence[np.ndarray], read_keys: Callable[[int], Sequence[str]]) -> Duplicates:
    """Keys that several lists share, or that one holds twice.

    Args:
        hashes: `hash_keys` of each list; read_keys: reads list number i again; only called for lists with duplicates.
    """
    ordered = np.sort(np.concatenate(hashes)) if hashes else np.empty(0, np.uint64)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(again):
        return Duplicates(0, ())
    some_again = np.unique(again)[:_COMPARED]
    compared = set(some_again.tolist())
    seen: dict[str, int] = {}
    found: list[tuple[str, int, int]] = []
    for index, own in enumerate(hashes):
        if not _holds(some_again, own).any():
            continue
        for key, value in zip(read_keys(index), own.tolist(), strict=True):
            if value in compared:
                if key in seen:
                    found.append((key, seen[key], index))
                seen.setdefault(key, index)
    # Different keys of one hash are possible; so the keys themselves decide, as long as there are not too many.
    count = len(found) if len(compared) < _COMPARED else max(len(found), len(again))
    return Duplicates(count, tuple(found[:_EXAMPLES]))


def some(count: int, examples: Sequence[str]) -> str:
    """A few of ``count`` names, for a message."""
    return ", ".join(examples[:_EXAMPLES]) + (", …" if count > min(len(examples), _EXAMPLES) else "")


def explain(
    missing: Sequence[str],
    missing_contents: np.ndarray,
    extra: Sequence[str],
    extra_hashes: np.ndarray,
    extra_contents: np.ndarray,
) -> list[str]:
    """Likely reasons why images without labels and labels without images did not match; empty where none is found.

    Args:
        missing: keys of images without labels; missing_contents: (len(missing),) uint64, their content hashes.
        extra: keys of labels without an image, some of them; extra_hashes, extra_contents: uint64, the hashes of the
            keys and of the content of all of them.
    """
    if not missing or not len(extra_hashes):
        return []
    known = np.unique(extra_hashes)
    found = _prefix_rule(missing, extra, known) or _ending_rule(missing, extra, known)
    hints = [found] if found else []
    same = int(np.isin(missing_contents, extra_contents).sum())
    if same:
        hints.append(f"{same:,} of the images without labels have the content of labels under other keys")
    return hints


def parse_prefix(text: str) -> tuple[str, str]:
    """``OLD=NEW`` → what an image's key starts with, and what the label's key has there.

    Raises:
        InputError: no ``=``, or more than one.
    """
    if text.count("=") != 1:
        raise InputError(
            f"a key prefix is OLD=NEW, such as train/= (leave out train/) or =train/ (add it), got {text!r}"
        )
    old, new = text.split("=")
    return old, new


def rename_keys(keys: Sequence[str], text: str) -> list[str]:
    """Keys with the prefix OLD of ``OLD=NEW`` replaced by NEW; those that do not start with OLD stay. An empty text
    changes nothing. Raises InputError as `parse_prefix`."""
    if not text:
        return list(keys)
    old, new = parse_prefix(text)
    return [new + key[len(old) :] if key.startswith(old) else key for key in keys]


def _prefix_rule(missing: Sequence[str], extra: Sequence[str], known: np.ndarray) -> str:
    """A change of folders that finds most of the missing keys."""
    rules = [
        (f"{old}={new}", lambda key, old=old, new=new: new + key[len(old) :] if key.startswith(old) else key)
        for old in _prefixes(missing)
        for new in _prefixes(extra)
        if old != new
    ]
    rule, count = _best(rules, missing, known)
    if not count:
        return ""
    old, new = rule.split("=", 1)
    how = (
        f"start with {old!r} in the images and {new!r} in the labels"
        if old and new
        else (f"start with {old!r} in the images only" if old else f"start with {new!r} in the labels only")
    )
    advice = f"`key_prefix={rule!r}` finds {count:,} of {len(missing):,}"
    return f"keys differ by their prefix: they {how}; {advice}"


def _ending_rule(missing: Sequence[str], extra: Sequence[str], known: np.ndarray) -> str:
    endings = [name for name, _ in Counter(_ending(key) for key in extra).most_common(_TRIED_NAMES)]
    rules = [(name, lambda key, name=name: key.removesuffix(_ending(key)) + name) for name in endings]
    name, count = _best(rules, missing, known)
    if not count:
        return ""
    ours = missing[0]
    theirs = ours.removesuffix(_ending(ours)) + name
    return (
        f"keys differ by the file's ending ({ours} in the images, {theirs} in the labels): "
        f"{count:,} of {len(missing):,} images were converted after they were labelled"
    )


def _best(rules: list[tuple[str, Callable[[str], str]]], missing: Sequence[str], known: np.ndarray) -> tuple[str, int]:
    """The rule that finds most of a sample's keys, and how many it finds of all; "" and 0 where none finds any."""
    sample = [missing[place] for place in np.linspace(0, len(missing) - 1, min(_TRIED_KEYS, len(missing))).astype(int)]
    counts = [(_count(map(change, sample), known), name, change) for name, change in rules]
    most = max(counts, key=lambda each: each[0], default=(0, "", None))
    return (most[1], _count(map(most[2], missing), known)) if most[0] else ("", 0)


def _count(keys: Iterable[str], known: np.ndarray) -> int:
    return int(_holds(known, hash_keys(list(keys))).sum())


def _holds(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    """bool (n,): which of ``values`` are in ``known``, which is sorted and not empty."""
    return known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values


def _prefixes(keys: Sequence[str]) -> list[str]:
    """The folders that most keys start with, at each depth; and none."""
    found = [""]
    for depth in range(1, 4):
        counts = Counter("/".join(key.split("/")[:depth]) + "/" for key in keys if key.count("/") >= depth)
        found += [name for name, _ in counts.most_common(_TRIED_NAMES)]
    return list(dict.fromkeys(found))


def _ending(key: str) -> str:
    name = key.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return dot + ending if stem else ""
