"""Between a shard's content and the plain arrays that a container stores: one layout for each encoding.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

import math
from dataclasses import dataclass

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.format.q8 import from_q8, to_q8
from stl_offline.labels.spec import LabelSpec


@dataclass(frozen=True)
class StoredArray:
    """One array of a container.

    dtype: None for strings; shape: its axes' lengths, None for one that only the data tells; axes: what they are;
    shuffle and level: how blosc's zstd is told to pack it, chosen by size and time on a real labeler's labels.
    """

    dtype: np.dtype | None
    shape: tuple[int | None, ...]
    axes: tuple[str, ...]
    shuffle: str = "shuffle"
    level: int = 5

    @property
    def is_sized(self) -> bool:
        """Whether the spec and the sample count tell the array's size."""
        return self.dtype is not None and None not in self.shape


# A shard unpacks to some 3 times its size, one of a single class everywhere to 50 times. What would unpack to far more
# is made to fill the reader's memory; below the first number it could do no harm.
_HARMLESS_BYTES, _MOST_RATIO = 1 << 28, 300

# Far more than any path. Without a limit a few kilobytes of a packed shard hold one key of gigabytes.
MOST_KEY_BYTES = 1 << 16

_MAP = ("sample", "view", "row", "column")


def layout(spec: LabelSpec, samples: int) -> dict[str, StoredArray]:
    """Which arrays a shard of ``samples`` samples holds, by name."""
    views, rows, columns, k = spec.map_shape
    cells = (samples, views, rows, columns)
    arrays = {
        "keys": StoredArray(None, (samples,), ("sample",)),
        "content_hash": StoredArray(np.dtype("<u8"), (samples,), ("sample",)),
        "class_id": StoredArray(np.dtype("<u4"), (samples,), ("sample",)),
        "views": StoredArray(np.dtype("<f4"), (samples, views, 6), ("sample", "view", "matrix")),
    }
    ranked = (*_MAP, "rank")
    if spec.encoding == "f16":
        arrays["class_ids"] = StoredArray(spec.id_dtype, (*cells, k), ranked, "bitshuffle", 4)
        arrays["logits"] = StoredArray(np.dtype("<f2"), (*cells, k), ranked, "shuffle", 4)
        arrays["confidence"] = StoredArray(np.dtype("<f2"), cells, _MAP, "bitshuffle", 4)
    else:
        arrays["palette"] = StoredArray(spec.id_dtype, (None,), ("entry",), "shuffle", 4)
        arrays["class_ranks"] = StoredArray(spec.id_dtype, (*cells, k), ranked, "shuffle", 3)
        arrays["confidence_steps"] = StoredArray(np.dtype("<u2"), cells, _MAP, "bitshuffle", 4)
        if k > 1:
            arrays["logit_gaps"] = StoredArray(np.dtype("u1"), (*cells, k - 1), (*_MAP, "gap"), "noshuffle", 1)
    return arrays


def check_claim(spec: LabelSpec, samples: int, size: int) -> None:
    """Refuse a shard of ``size`` bytes that says it holds more than they can; before anything is unpacked.

    Raises:
        FormatError: manifest and shard agree on labels that would fill the memory.
    """
    # Each sample has a hash of its own.
    arrays = [array for array in layout(spec, samples).values() if array.is_sized]
    claimed = sum(array.dtype.itemsize * math.prod(array.shape) for array in arrays)
    if not 0 < samples <= size or claimed > _HARMLESS_BYTES + _MOST_RATIO * size:
        raise FormatError(f"the shard claims {samples:,} samples in {claimed:,} bytes, which its {size:,} cannot hold")


def to_stored(arrays: ShardArrays, spec: LabelSpec) -> dict[str, np.ndarray]:
    """The arrays to store, by name; ``keys`` as an array of strings.

    Raises:
        FormatError: the content does not fit the spec, or a value cannot be held (a logit beyond float16).
    """
    arrays.check(spec)
    for key in arrays.keys:
        if len(key.encode()) > MOST_KEY_BYTES:
            raise FormatError(f"the key {key[:40]}… has more than {MOST_KEY_BYTES:,} bytes; shorten the image's path")
    stored = {
        "keys": np.array(arrays.keys, dtype=np.dtypes.StringDType()),
        "content_hash": arrays.content_hash,
        "class_id": arrays.class_id,
        "views": arrays.views,
    }
    if spec.encoding == "q8":
        return stored | to_q8(arrays, spec)
    logits, confidence = _to_half(arrays.logits), _to_half(arrays.confidence)
    if not (np.isfinite(logits).all() and (confidence > 0).all()):
        raise FormatError("a logit or a confidence is beyond float16; scale the labeler's logits")
    return stored | {"class_ids": arrays.class_ids, "logits": logits, "confidence": confidence}


def from_stored(stored: dict[str, np.ndarray], spec: LabelSpec) -> ShardArrays:
    """The inverse of `to_stored`; checks every value, raises FormatError."""
    maps = from_q8(stored, spec) if spec.encoding == "q8" else stored
    return ShardArrays(
        keys=stored["keys"].tolist(),
        content_hash=stored["content_hash"],
        class_id=stored["class_id"],
        views=stored["views"],
        class_ids=maps["class_ids"],
        logits=maps["logits"],
        confidence=maps["confidence"],
    ).check(spec)


def _to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype("<f2", copy=False)
