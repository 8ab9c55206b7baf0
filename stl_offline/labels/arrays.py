"""Labels in memory: one image's label map, and the content of one label shard, whatever its container and encoding.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell; S: classes drawn for each; K: all
classes; c, s: classes kept and drawn of the class head's answer.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

from stl_offline.errors import FormatError, InputError
from stl_offline.geometry import View
from stl_offline.labels.draws import entries, frequencies
from stl_offline.labels.rules import (
    check_augmentation,
    check_cells,
    check_class_id,
    check_confidence,
    check_draws,
    check_keys,
    check_views,
)
from stl_offline.labels.spec import LabelSpec

# What only some label sets of version 2 have, or lack.
OPTIONAL = ("confidence", "draws", "head_ids", "head_logits", "head_confidence", "head_draws", "augmentation")
# Arrays of `ShardArrays` whose second axis is V.
OF_VIEW = ("views", "class_ids", "logits", *OPTIONAL[:-1])


@dataclass(frozen=True, eq=False)
class LabelMap:
    """One image's label maps, one for each view under which it was labelled.

    key: path below the data set's root; class_id: the image's own class, None where the set's images have none;
    content_hash: xxh3 of its bytes; class_ids: (V, Gh, Gw, k), best first; logits: (V, Gh, Gw, k); confidence: (V, Gh,
    Gw), the probability of the best class; views: (V, 6) float32, the rows of each 2×3 view; num_classes: K.

    Of format version 2, None where the set has none: draws: (V, Gh, Gw, S), classes drawn from what the k classes leave
    (from all classes where k is 0); head_ids, head_logits: (V, c) and head_confidence: (V,), the class head's best
    classes; head_draws: (V, s), classes drawn from what these leave; augmentation: V JSON values.
    """

    key: str
    class_id: int | None
    content_hash: int
    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray
    views: np.ndarray
    num_classes: int
    draws: np.ndarray | None = None
    head_ids: np.ndarray | None = None
    head_logits: np.ndarray | None = None
    head_confidence: np.ndarray | None = None
    head_draws: np.ndarray | None = None
    augmentation: list | None = None

    def view(self, index: int = 0) -> View:
        """The view (from the map's unit coordinates to the image's) of map ``index``."""
        return View.from_array(self.views[index])

    def probabilities(self) -> np.ndarray:
        """float32 (V, Gh, Gw, k): each stored class's probability; what a cell's sum leaves to 1 is its residual."""
        return probabilities(self.logits, self.confidence)

    def residual(self) -> np.ndarray:
        """float32 (V, Gh, Gw): the mass outside the top k, which draws stand for where there are any."""
        return np.maximum(0, 1 - self.probabilities().sum(-1))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """All that is stored of each cell's distribution: class ids and float32 masses, both (V, Gh, Gw, k + S).

        The S drawn classes share the mass outside the top k evenly; a class may be drawn several times.
        """
        return entries(self.class_ids, self.probabilities(), self.draws)

    def listed(self) -> "LabelMap":
        """The same distribution as a top-k map, for what reads these: a class's mass is its probability or frequency.

        Every cell names each of its classes once, most mass first; entries of mass 0 repeat the first. The map itself
        where it has no draws.
        """
        return _listed(self)

    def dense(self, residual: str = "ignore") -> np.ndarray:
        """float32 (V, Gh, Gw, K): probabilities of all classes.

        residual: what becomes of the mass that neither the top k nor draws account for. "ignore" leaves it out, so a
        cell sums to less than one; "uniform" spreads it evenly over all K classes, so a cell sums to one.

        Raises:
            InputError: another word for ``residual``.
        """
        if residual not in ("ignore", "uniform"):
            raise InputError(f'residual must be "ignore" or "uniform", got {residual!r}')
        ids, masses = self.entries()
        full = np.zeros((*ids.shape[:-1], self.num_classes), dtype=np.float32)
        cells = np.arange(full[..., 0].size)[:, None]
        np.add.at(full.reshape(len(cells), -1), (cells, ids.reshape(len(cells), -1)), masses.reshape(len(cells), -1))
        if residual == "uniform":
            full += np.maximum(0, 1 - masses.sum(-1))[..., None] / np.float32(self.num_classes)
        return full


class ShardIndex(NamedTuple):
    """Whose labels a shard holds: n keys, content_hashes (n,) uint64, class_ids (n,) uint32."""

    keys: list[str]
    content_hashes: np.ndarray
    class_ids: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardArrays:
    """Labels of n samples, in sample order.

    keys: n strings; content_hash: (n,) uint64, xxh3 of the image's bytes; class_id: (n,) uint32, the image's
    class; views: (n, V, 6) float32, the rows of each 2×3 view; class_ids: (n, V, Gh, Gw, k) uint16 or uint32, best
    first; logits: (n, V, Gh, Gw, k) and confidence: (n, V, Gh, Gw), float16 as stored, or float32 before encoding.

    Of format version 2, None where there is none: draws: (n, V, Gh, Gw, S); head_ids, head_logits: (n, V, c),
    head_confidence: (n, V), head_draws: (n, V, s); augmentation: n strings, each a JSON list of V entries. There, k may
    be 0 and confidence None. See `LabelMap`.

    Raises:
        FormatError: shapes, dtypes or values that no label shard can have.
    """

    keys: list[str]
    content_hash: np.ndarray
    class_id: np.ndarray
    views: np.ndarray
    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray | None = None
    draws: np.ndarray | None = None
    head_ids: np.ndarray | None = None
    head_logits: np.ndarray | None = None
    head_confidence: np.ndarray | None = None
    head_draws: np.ndarray | None = None
    augmentation: list[str] | None = None

    def __post_init__(self) -> None:
        n = len(self.keys)
        if not n:
            raise FormatError("a shard holds at least one sample")
        object.__setattr__(self, "keys", [str(key) for key in self.keys])
        if self.class_ids.ndim != 5:
            raise FormatError(f"class_ids must be (n, V, Gh, Gw, k), got the shape {self.class_ids.shape}")
        map_shape = self.class_ids.shape[1:]
        views = (n, map_shape[0])
        # An axis of None may have any length.
        for name, shape, dtypes in (
            ("content_hash", (n,), ("<u8",)),
            ("class_id", (n,), ("<u4", "<i8")),
            ("views", (*views, 6), ("<f4",)),
            ("class_ids", (n, *map_shape), ("<u2", "<u4")),
            ("logits", (n, *map_shape), ("<f2", "<f4")),
            ("confidence", (n, *map_shape[:-1]), ("<f2", "<f4")),
            ("draws", (n, *map_shape[:-1], None), ("<u2", "<u4")),
            ("head_ids", (*views, None), ("<u2", "<u4")),
            ("head_logits", (*views, None), ("<f2", "<f4")),
            ("head_confidence", views, ("<f2", "<f4")),
            ("head_draws", (*views, None), ("<u2", "<u4")),
        ):
            array = getattr(self, name)
            if array is None and name in OPTIONAL:
                continue
            shape = tuple(have if want is None else want for want, have in zip(shape, array.shape, strict=False))
            if array.shape != shape or array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
                raise FormatError(f"{name} must be {shape} {'|'.join(dtypes)}, got {array.shape} {array.dtype.str}")
        if self.class_id.dtype != np.uint32:
            if not (self.class_id.min() >= 0 and self.class_id.max() < 2**32):
                raise FormatError("class_id must lie within uint32")
            object.__setattr__(self, "class_id", self.class_id.astype(np.uint32))
        check_keys(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def listed(self) -> "ShardArrays":
        """The same distributions as top-k labels (`LabelMap.listed`)."""
        return _listed(self)

    def label_map(self, row: int, spec: LabelSpec) -> LabelMap:
        """The label map of sample ``row``: copies, so that it does not keep the whole shard in memory."""
        return LabelMap(
            key=self.keys[row],
            class_id=int(self.class_id[row]) if spec.has_own_classes else None,
            content_hash=int(self.content_hash[row]),
            class_ids=self.class_ids[row].copy(),
            logits=self.logits[row].copy(),
            views=self.views[row].copy(),
            num_classes=spec.num_classes,
            augmentation=None if self.augmentation is None else json.loads(self.augmentation[row]),
            **{
                name: None if getattr(self, name) is None else getattr(self, name)[row].copy()
                for name in OPTIONAL
                if name != "augmentation"
            },
        )

    def check(self, spec: LabelSpec) -> "ShardArrays":
        """Compare with the label set's spec and apply every rule of `stl_offline.labels.rules`; gives itself back.

        Raises:
            FormatError: another grid, k or number of views; an image's class, a view or a cell that breaks a rule.
        """
        if self.class_ids.shape[1:] != spec.map_shape:
            raise FormatError(
                f"maps are (V, Gh, Gw, k) = {self.class_ids.shape[1:]}, the label set has {spec.map_shape}"
            )
        if self.class_ids.dtype != spec.id_dtype:
            raise FormatError(f"class ids are {self.class_ids.dtype}, the label set has {spec.id_dtype}")
        check_class_id(self.class_id, spec)
        check_views(self.keys, self.views, spec)
        self._check_lengths(spec)
        if spec.top_k:
            check_cells(self.keys, self.class_ids, self.logits, self.confidence, spec)
        elif self.confidence is not None:
            check_confidence(self.keys, self.confidence)
        if self.head_ids is not None:
            check_cells(self.keys, self.head_ids, self.head_logits, self.head_confidence, spec, "f16")
        for drawn, stored in ((self.draws, self.class_ids), (self.head_draws, self.head_ids)):
            if drawn is not None:
                check_draws(self.keys, drawn, stored, spec)
        if self.augmentation is not None:
            check_augmentation(self.keys, self.augmentation, spec)
        return self

    def _check_lengths(self, spec: LabelSpec) -> None:
        """Raise FormatError where an optional array is there and should not be, or has another length."""
        # The last axis's length; None: that of the whole map.
        lengths = {
            "confidence": None if spec.has_confidence else 0,
            "draws": spec.draws,
            "head_ids": spec.class_top_k,
            "head_logits": spec.class_top_k,
            "head_confidence": None if spec.class_top_k else 0,
            "head_draws": spec.class_draws,
            "augmentation": None if spec.has_augmentation else 0,
        }
        for name, length in lengths.items():
            array = getattr(self, name)
            if (array is not None) != (length != 0):
                raise FormatError(f"labels {'without' if array is None else 'with'} {name}, and the label set is not")
            if length and (array.shape[-1] != length or (array.dtype.kind == "u" and array.dtype != spec.id_dtype)):
                raise FormatError(
                    f"{name} is {array.dtype} {array.shape}, the label set has {length} in {spec.id_dtype}"
                )

    def equals(self, other: "ShardArrays") -> bool:
        """Whether both hold the same bits."""
        return all(
            getattr(self, name) == getattr(other, name)
            if isinstance(getattr(self, name), list | None) or getattr(other, name) is None
            else getattr(self, name).dtype == getattr(other, name).dtype
            and getattr(self, name).shape == getattr(other, name).shape
            and getattr(self, name).tobytes() == getattr(other, name).tobytes()
            for name in (field.name for field in fields(self))
        )


def _listed(labels: Any) -> Any:
    """Of a `LabelMap` or `ShardArrays`."""
    if labels.draws is None:
        return labels
    stored = entries(labels.class_ids, probabilities(labels.logits, labels.confidence), labels.draws)
    ids, masses = frequencies(*stored)
    with np.errstate(divide="ignore"):
        logits = np.log(masses)
    return replace(labels, class_ids=ids, logits=logits, confidence=masses[..., 0], draws=None)


def join_views(maps: Sequence[LabelMap]) -> LabelMap:
    """One image's label maps of several parts of a set as one. Raises FormatError where they are of several images."""
    first = maps[0]
    if any((each.key, each.content_hash) != (first.key, first.content_hash) for each in maps):
        raise FormatError(f"the parts of the label set hold other images than each other, first at {first.key}")
    joined: dict[str, Any] = {}
    for field in fields(LabelMap):
        values = [getattr(each, field.name) for each in maps]
        if isinstance(values[0], np.ndarray):
            joined[field.name] = np.concatenate(values)
        elif field.name == "augmentation" and values[0] is not None:
            joined[field.name] = [record for value in values for record in value]
    return replace(first, **joined)


def select(arrays: ShardArrays, samples: slice) -> ShardArrays:
    """The labels of some of the samples."""
    values = {field.name: getattr(arrays, field.name) for field in fields(ShardArrays)}
    return ShardArrays(**{name: None if value is None else value[samples] for name, value in values.items()})


def select_views(arrays: ShardArrays, views: range) -> ShardArrays:
    """Some consecutive views, by their places 0 … V, of all samples."""
    if views == range(arrays.class_ids.shape[1]):
        return arrays
    of_view = {
        name: np.ascontiguousarray(array[:, views.start : views.stop])
        for name in OF_VIEW
        if (array := getattr(arrays, name)) is not None
    }
    if arrays.augmentation is not None:
        records = [json.loads(text)[views.start : views.stop] for text in arrays.augmentation]
        of_view["augmentation"] = [json.dumps(record, ensure_ascii=False) for record in records]
    return replace(arrays, **of_view)


def join_parts(parts: Sequence[ShardArrays]) -> ShardArrays:
    """The views of several parts of a set as one. Raises FormatError where they are of several images."""
    first = parts[0]
    if len(parts) == 1:
        return first
    for each in parts:
        if each.keys != first.keys or (each.content_hash != first.content_hash).any():
            raise FormatError("the parts of the label set hold other images than each other")
    joined = {
        name: np.concatenate([getattr(each, name) for each in parts], axis=1)
        for name in OF_VIEW
        if getattr(first, name) is not None
    }
    if first.augmentation is not None:
        records = zip(*([json.loads(text) for text in each.augmentation] for each in parts), strict=True)
        joined["augmentation"] = [json.dumps([*itertools.chain(*each)], ensure_ascii=False) for each in records]
    return replace(first, **joined)


def concatenate(parts: Sequence[ShardArrays]) -> ShardArrays:
    """The labels of several runs of samples, one after the other. Raises FormatError where they do not fit."""
    if len(parts) == 1:
        return parts[0]
    joined = {}
    for field in fields(ShardArrays):
        values = [getattr(part, field.name) for part in parts]
        if any(value is None for value in values):
            joined[field.name] = None
        else:
            is_list = isinstance(values[0], list)
            joined[field.name] = [text for value in values for text in value] if is_list else np.concatenate(values)
    return ShardArrays(**joined)


def probabilities(logits: np.ndarray, confidence: np.ndarray | None) -> np.ndarray:
    """The top-k probabilities: logits (..., k) and confidence (...) → float32 (..., k).

    Since a softmax keeps differences, p_i = confidence · exp(logit_i − logit_1), where logit_1 is the best class's and
    confidence its probability. What is left to 1 is the residual. Computed in float32: this is the one definition.
    confidence may be None where k is 0.
    """
    values = np.asarray(logits).astype(np.float32)
    if not values.shape[-1]:
        return values
    values -= values[..., :1].copy()
    np.exp(values, out=values)
    values *= np.asarray(confidence).astype(np.float32)[..., None]
    return values
