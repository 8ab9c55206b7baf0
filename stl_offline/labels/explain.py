"""Why images and labels do not match, and which setting joins them.

Each piece of advice is tried on all of the images first, so that what is advised does what is promised.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stl_offline.labels.keys import hash_keys, holds
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.match import stem

# Of keys that do not match: how many are tried against a rule, and how many folders make rules.
_TRIED_KEYS = 1000
_TRIED_NAMES = 4
# Keys of labels that are looked at for rules.
_LOOKED_AT = 10_000


@dataclass(frozen=True)
class Difference:
    """What a join left over. unlabelled: numbers of the images without a label; changed: images whose label is of
    another content."""

    match: str
    unlabelled: np.ndarray
    changed: int


@dataclass(frozen=True)
class _Labels:
    """names, contents: hashes, uint64, in the order of ``names``; keys: some of them."""

    names: np.ndarray
    contents: np.ndarray
    keys: list[str]

    @classmethod
    def of(cls, label_set: LabelSet, name: Callable[[str], str]) -> "_Labels":
        names, contents, keys = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], []
        for index in label_set.present:
            shard = label_set.read_index(index)
            names.append(hash_keys([name(key) for key in shard.keys]))
            contents.append(shard.content_hashes)
            keys += shard.keys[: _LOOKED_AT - len(keys)]
        joined = np.concatenate(names)
        order = np.argsort(joined, kind="stable")
        return cls(joined[order], np.concatenate(contents)[order], keys)

    def found(self, names: Sequence[str], contents: np.ndarray) -> tuple[int, int]:
        """How many of the names labels have, and how many of these with the same content."""
        hashes = hash_keys(names)
        places = np.minimum(np.searchsorted(self.names, hashes), len(self.names) - 1)
        there = self.names[places] == hashes
        return int(there.sum()), int((there & (self.contents[places] == contents)).sum())


def explain(label_set: LabelSet, keys: Sequence[str], content_hashes: np.ndarray, difference: Difference) -> list[str]:
    """Likely reasons why images have no labels or labels of other contents; empty where none is found.

    Args:
        keys, content_hashes: (n,) of all images, as they were joined.
    """
    labels = _Labels.of(label_set, lambda key: key)
    if not len(labels.names):
        return []
    unlabelled = difference.unlabelled
    missing, contents = [keys[int(place)] for place in unlabelled], content_hashes[unlabelled]
    if difference.match == "content":
        by_key, _ = labels.found(missing, contents)
        return [f'{by_key:,} of them have the key of a label of another content: `match="key"`'] if by_key else []
    hints = []
    if missing and difference.match == "key" and (rule := _prefix_rule(missing, contents, labels, keys)):
        hints.append(rule)
    by_content = int(holds(np.sort(labels.contents), content_hashes).sum())
    if by_content > len(keys) - len(missing) - difference.changed:
        hints.append(f'{by_content:,} of {len(keys):,} images match by content: `match="content"` joins them')
    elif missing and difference.match == "key" and not hints:
        rule, count = _stem_rule(label_set, keys, content_hashes)
        if count > len(keys) - len(missing):
            hints.append(rule)
    return hints


def _changed(count: int, unchanged: int) -> str:
    if unchanged == count:
        return ""
    many = "all of them" if not unchanged else f"{count - unchanged:,} of them"
    return f" (the content of {many} differs: also needs `allow_changed=True`)"


def _prefix_rule(missing: Sequence[str], contents: np.ndarray, labels: _Labels, keys: Sequence[str]) -> str:
    """A change of folders that finds most of the missing keys, and gives none of them the key of another image."""
    sample = [missing[place] for place in np.linspace(0, len(missing) - 1, min(_TRIED_KEYS, len(missing))).astype(int)]
    count, old, new = max(
        (
            (int(holds(labels.names, hash_keys(_replace(sample, old, new))).sum()), old, new)
            for old in _prefixes(missing)
            for new in _prefixes(labels.keys)
            if old != new
        ),
        key=lambda each: each[0],
        default=(0, "", ""),
    )
    renamed = _replace(missing, old, new)
    if not count or not set(renamed).isdisjoint(set(keys).difference(missing)):
        return ""
    count, unchanged = labels.found(renamed, contents)
    how = (
        f"start with {old!r} in the images and {new!r} in the labels"
        if old and new
        else (f"start with {old!r} in the images only" if old else f"start with {new!r} in the labels only")
    )
    advice = f"`key_prefix={f'{old}={new}'!r}` finds {count:,} of {len(missing):,}{_changed(count, unchanged)}"
    return f"keys differ by their prefix: they {how}; {advice}"


def _stem_rule(label_set: LabelSet, keys: Sequence[str], contents: np.ndarray) -> tuple[str, int]:
    """Other folders or file endings, where base names tell images apart; and how many images it finds labels of."""
    stems = [stem(key) for key in keys]
    labels = _Labels.of(label_set, stem)
    doubled = labels.names[1:][labels.names[1:] == labels.names[:-1]]
    if len(set(stems)) < len(stems) or (len(doubled) and holds(doubled, hash_keys(stems)).any()):
        return "", 0
    count, unchanged = labels.found(stems, contents)
    if not count:
        return "", 0
    first = next(place for place, name in enumerate(stems) if holds(labels.names, hash_keys([name])).any())
    theirs = next((key for key in labels.keys if stem(key) == stems[first]), None)
    example = f" ({keys[first]} in the images, {theirs} in the labels)" if theirs else ""
    rule = (
        f'keys differ by folders or file endings{example}: `match="stem"` finds {count:,} of {len(keys):,}'
        f"{_changed(count, unchanged)}"
    )
    return rule, count


def _replace(keys: Sequence[str], old: str, new: str) -> list[str]:
    return [new + key[len(old) :] if key.startswith(old) else key for key in keys]


def _prefixes(keys: Sequence[str]) -> list[str]:
    """The folders that most keys start with, at each depth; and none."""
    found = [""]
    for depth in range(1, 4):
        counts = Counter("/".join(key.split("/")[:depth]) + "/" for key in keys if key.count("/") >= depth)
        found += [name for name, _ in counts.most_common(_TRIED_NAMES)]
    return list(dict.fromkeys(found))
