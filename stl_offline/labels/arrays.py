"""Labels in memory: one image's label map, and the content of one label shard, whatever its container and encoding.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell; K: all classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np

from stl_offline.errors import FormatError, InputError
from stl_offline.geometry import View
from stl_offline.labels.rules import check_cells, check_class_id, check_keys, check_views
from stl_offline.labels.spec import LabelSpec


@dataclass(frozen=True, eq=False)
class LabelMap:
    """One image's label maps, one for each view under which it was labelled.

    key: path below the data set's root; class_id: the image's own class, None where the set's images have none;
    content_hash: xxh3 of its bytes; class_ids: (V, Gh, Gw, k), best first; logits: (V, Gh, Gw, k); confidence: (V, Gh,
    Gw), the probability of the best class; views: (V, 6) float32, the rows of each 2×3 view; num_classes: K.
    """

    key: str
    class_id: int | None
    content_hash: int
    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray
    views: np.ndarray
    num_classes: int

    def view(self, index: int = 0) -> View:
        """The view (from the map's unit coordinates to the image's) of map ``index``."""
        return View.from_array(self.views[index])

    def probabilities(self) -> np.ndarray:
        """float32 (V, Gh, Gw, k): each stored class's probability; what a cell's sum leaves to 1 is its residual."""
        return probabilities(self.logits, self.confidence)

    def residual(self) -> np.ndarray:
        """float32 (V, Gh, Gw): the mass outside the top k."""
        return np.maximum(0, 1 - self.probabilities().sum(-1))

    def dense(self, residual: str = "ignore") -> np.ndarray:
        """float32 (V, Gh, Gw, K): probabilities of all classes.

        residual: what becomes of the mass outside the top k. "ignore" leaves it out, so a cell sums to less than one;
        "uniform" spreads it evenly over all K classes, so a cell sums to one.

        Raises:
            InputError: another word for ``residual``.
        """
        if residual not in ("ignore", "uniform"):
            raise InputError(f'residual must be "ignore" or "uniform", got {residual!r}')
        full = np.zeros((*self.confidence.shape, self.num_classes), dtype=np.float32)
        np.put_along_axis(full, self.class_ids.astype(np.int64), self.probabilities(), axis=-1)
        if residual == "uniform":
            full += self.residual()[..., None] / np.float32(self.num_classes)
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

    Raises:
        FormatError: shapes, dtypes or values that no label shard can have.
    """

    keys: list[str]
    content_hash: np.ndarray
    class_id: np.ndarray
    views: np.ndarray
    class_ids: np.ndarray
    logits: np.ndarray
    confidence: np.ndarray

    def __post_init__(self) -> None:
        n = len(self.keys)
        if not n:
            raise FormatError("a shard holds at least one sample")
        object.__setattr__(self, "keys", [str(key) for key in self.keys])
        if self.class_ids.ndim != 5:
            raise FormatError(f"class_ids must be (n, V, Gh, Gw, k), got the shape {self.class_ids.shape}")
        map_shape = self.class_ids.shape[1:]
        for name, shape, dtypes in (
            ("content_hash", (n,), ("<u8",)),
            ("class_id", (n,), ("<u4", "<i8")),
            ("views", (n, map_shape[0], 6), ("<f4",)),
            ("class_ids", (n, *map_shape), ("<u2", "<u4")),
            ("logits", (n, *map_shape), ("<f2", "<f4")),
            ("confidence", (n, *map_shape[:-1]), ("<f2", "<f4")),
        ):
            array = getattr(self, name)
            if array.shape != shape or array.dtype not in [np.dtype(dtype) for dtype in dtypes]:
                raise FormatError(f"{name} must be {shape} {'|'.join(dtypes)}, got {array.shape} {array.dtype.str}")
        if self.class_id.dtype != np.uint32:
            if not (self.class_id.min() >= 0 and self.class_id.max() < 2**32):
                raise FormatError("class_id must lie within uint32")
            object.__setattr__(self, "class_id", self.class_id.astype(np.uint32))
        check_keys(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def label_map(self, row: int, spec: LabelSpec) -> LabelMap:
        """The label map of sample ``row``: copies, so that it does not keep the whole shard in memory."""
        return LabelMap(
            key=self.keys[row],
            class_id=int(self.class_id[row]) if spec.has_own_classes else None,
            content_hash=int(self.content_hash[row]),
            class_ids=self.class_ids[row].copy(),
            logits=self.logits[row].copy(),
            confidence=self.confidence[row].copy(),
            views=self.views[row].copy(),
            num_classes=spec.num_classes,
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
        check_cells(self.keys, self.class_ids, self.logits, self.confidence, spec)
        return self

    def equals(self, other: "ShardArrays") -> bool:
        """Whether both hold the same bits."""
        return all(
            getattr(self, name) == getattr(other, name)
            if name == "keys"
            else getattr(self, name).dtype == getattr(other, name).dtype
            and getattr(self, name).shape == getattr(other, name).shape
            and getattr(self, name).tobytes() == getattr(other, name).tobytes()
            for name in (field.name for field in fields(self))
        )


def select(arrays: ShardArrays, samples: slice) -> ShardArrays:
    """The labels of some of the samples."""
    return ShardArrays(**{field.name: getattr(arrays, field.name)[samples] for field in fields(ShardArrays)})


def concatenate(parts: Sequence[ShardArrays]) -> ShardArrays:
    """The labels of several runs of samples, one after the other. Raises FormatError where they do not fit."""
    if len(parts) == 1:
        return parts[0]
    names = [field.name for field in fields(ShardArrays) if field.name != "keys"]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return ShardArrays(keys=[key for part in parts for key in part.keys], **arrays)


def probabilities(logits: np.ndarray, confidence: np.ndarray) -> np.ndarray:
    """The top-k probabilities: logits (..., k) and confidence (...) → float32 (..., k).

    Since a softmax keeps differences, p_i = confidence · exp(logit_i − logit_1), where logit_1 is the best class's and
    confidence its probability. What is left to 1 is the residual. Computed in float32: this is the one definition.
    """
    values = np.asarray(logits).astype(np.float32)
    values -= values[..., :1].copy()
    np.exp(values, out=values)
    values *= np.asarray(confidence).astype(np.float32)[..., None]
    return values
