"""Between a shard's content and the plain arrays that a container stores: one layout for each encoding.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

from dataclasses import dataclass

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec


@dataclass(frozen=True)
class StoredArray:
    """One array of a container: its dtype (None: strings), its shape, and what its axes are."""

    dtype: np.dtype | None
    shape: tuple[int, ...]
    axes: tuple[str, ...]


_MAP = ("sample", "view", "row", "column")


def layout(spec: LabelSpec, samples: int) -> dict[str, StoredArray]:
    """Which arrays a shard of ``samples`` samples holds, by name."""
    map_shape = (samples, *spec.map_shape)
    return {
        "keys": StoredArray(None, (samples,), ("sample",)),
        "content_hash": StoredArray(np.dtype("<u8"), (samples,), ("sample",)),
        "class_id": StoredArray(np.dtype("<u4"), (samples,), ("sample",)),
        "views": StoredArray(np.dtype("<f4"), (*map_shape[:2], 6), ("sample", "view", "matrix")),
        "class_ids": StoredArray(spec.id_dtype, map_shape, (*_MAP, "rank")),
        "logits": StoredArray(np.dtype("<f2"), map_shape, (*_MAP, "rank")),
        "confidence": StoredArray(np.dtype("<f2"), map_shape[:-1], _MAP),
    }


def to_stored(arrays: ShardArrays, spec: LabelSpec) -> dict[str, np.ndarray]:
    """The arrays to store, by name; ``keys`` as an array of strings.

    Raises:
        FormatError: the content does not fit the spec, or a value cannot be held (a logit beyond float16).
    """
    arrays.check(spec)
    stored = {
        "keys": np.array(arrays.keys, dtype=np.dtypes.StringDType()),
        "content_hash": arrays.content_hash,
        "class_id": arrays.class_id,
        "views": arrays.views,
        "class_ids": arrays.class_ids,
        "logits": _to_half(arrays.logits),
        "confidence": _to_half(arrays.confidence),
    }
    if not (np.isfinite(stored["logits"]).all() and (stored["confidence"] > 0).all()):
        raise FormatError("a logit or a confidence is beyond float16; scale the labeler's logits")
    return stored


def from_stored(stored: dict[str, np.ndarray], spec: LabelSpec) -> ShardArrays:
    """The inverse of `to_stored`; checks every value, raises FormatError."""
    return ShardArrays(
        keys=stored["keys"].tolist(),
        content_hash=stored["content_hash"],
        class_id=stored["class_id"],
        views=stored["views"],
        class_ids=stored["class_ids"],
        logits=stored["logits"],
        confidence=stored["confidence"],
    ).check(spec)


def _to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype("<f2", copy=False)
