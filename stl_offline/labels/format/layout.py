"""Between a shard's content and the plain arrays that a container stores: one layout for each encoding.

n: samples; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell; S: classes drawn for each; c, s:
classes kept and drawn of the class head's answer.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.format.q8 import from_q8, to_q8
from stl_offline.labels.spec import LabelSpec


@dataclass(frozen=True)
class StoredArray:
    """One array of a container.

    dtype: None for strings; shape: its axes' lengths, None for one that only the data tells; axes: what they are;
    shuffle and level: how blosc's zstd is told to pack it, chosen by size and time on a real labeler's labels;
    endian: the byte order in a zarr chunk.
    """

    dtype: np.dtype | None
    shape: tuple[int | None, ...]
    axes: tuple[str, ...]
    shuffle: str = "shuffle"
    level: int = 5
    endian: str = "little"

    @property
    def is_sized(self) -> bool:
        """Whether the spec and the sample count tell the array's size."""
        return self.dtype is not None and None not in self.shape


# A shard unpacks to some 3 times its size, one of a single class everywhere to 50 times. What would unpack to far more
# is made to fill the reader's memory; below the first number it could do no harm.
_HARMLESS_BYTES, _MOST_RATIO = 1 << 28, 300

# Far more than any path. Without a limit a few kilobytes of a packed shard hold one key of gigabytes.
MOST_KEY_BYTES = 1 << 16
# All keys of a shard together: below the first number they could do no harm, and no shard packs its labels and keys to
# less than a 30th of the keys alone.
_HARMLESS_KEY_BYTES, _MOST_KEY_RATIO = 1 << 24, 30

_U2 = np.dtype("<u2")
_MAP = ("sample", "view", "row", "column")


def layout(spec: LabelSpec, samples: int) -> dict[str, StoredArray]:
    """Which arrays a shard of ``samples`` samples holds, by name."""
    views, rows, columns, k = spec.map_shape
    cells = (samples, views, rows, columns)
    # The bytes of version 1 are fixed; version 2 packs some arrays harder.
    is_first = spec.format_version == 1
    view_packing = ("shuffle", 5) if is_first else ("noshuffle", 9)
    # A single draw is 4 to 5 % smaller this way and takes 110 µs to pack. Each of several takes as long and gains less.
    # The high bytes come first, because they are the ones that repeat: zstd packs what follows them better.
    draw_packing = ("shuffle", 9, "big") if spec.draws == 1 else ("bitshuffle", 4)
    arrays = {
        "keys": StoredArray(None, (samples,), ("sample",), level=5 if is_first else 19),
        "content_hash": StoredArray(np.dtype("<u8"), (samples,), ("sample",)),
        "class_id": StoredArray(np.dtype("<u4"), (samples,), ("sample",)),
        "views": StoredArray(np.dtype("<f4"), (samples, views, 6), ("sample", "view", "matrix"), *view_packing),
    }
    of_view, c, s = (samples, views), spec.class_top_k, spec.class_draws
    ranked = (*_MAP, "rank")
    drawn = (*_MAP, "draw")
    ids, half, u1 = spec.id_dtype, np.dtype("<f2"), np.dtype("u1")
    is_q8 = spec.encoding == "q8"
    for name, is_stored, array in (
        ("class_ids", k and not is_q8, StoredArray(ids, (*cells, k), ranked, "bitshuffle", 4)),
        ("logits", k and not is_q8, StoredArray(half, (*cells, k), ranked, "shuffle", 4)),
        ("confidence", spec.has_confidence and not is_q8, StoredArray(half, cells, _MAP, "bitshuffle", 4)),
        ("draws", spec.draws and not is_q8, StoredArray(ids, (*cells, spec.draws), drawn, *draw_packing)),
        ("palette", is_q8, StoredArray(ids, (None,), ("entry",), "shuffle", 4)),
        ("class_ranks", k and is_q8, StoredArray(ids, (*cells, k), ranked, "shuffle", 3)),
        ("confidence_steps", spec.has_confidence and is_q8, StoredArray(_U2, cells, _MAP, "bitshuffle", 4)),
        ("logit_gaps", k > 1 and is_q8, StoredArray(u1, (*cells, k - 1), (*_MAP, "gap"), "noshuffle", 1)),
        ("draw_ranks", spec.draws and is_q8, StoredArray(ids, (*cells, spec.draws), drawn, "shuffle", 3)),
        ("head_ids", c, StoredArray(ids, (*of_view, c), (*_MAP[:2], "rank"))),
        ("head_logits", c, StoredArray(half, (*of_view, c), (*_MAP[:2], "rank"))),
        ("head_confidence", c, StoredArray(half, of_view, _MAP[:2])),
        ("head_draws", s, StoredArray(ids, (*of_view, s), (*_MAP[:2], "draw"))),
        ("augmentation", spec.has_augmentation, StoredArray(None, (samples,), ("sample",))),
    ):
        if is_stored:
            arrays[name] = array
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


def most_key_bytes(size: int) -> int:
    """What the keys of a shard of ``size`` bytes may unpack to."""
    return _HARMLESS_KEY_BYTES + _MOST_KEY_RATIO * size


def to_stored(arrays: ShardArrays, spec: LabelSpec) -> dict[str, np.ndarray]:
    """The arrays to store, by name; ``keys`` as an array of strings.

    Raises:
        FormatError: the content does not fit the spec, or a value cannot be held (a logit beyond float16).
    """
    arrays.check(spec)
    for text in arrays.augmentation or ():
        if len(text.encode()) > MOST_KEY_BYTES:
            raise FormatError(f"an image's augmentation record has more than {MOST_KEY_BYTES:,} bytes: {text[:40]}…")
    for key in arrays.keys:
        if len(key.encode()) > MOST_KEY_BYTES:
            raise FormatError(f"the key {key[:40]}… has more than {MOST_KEY_BYTES:,} bytes; shorten the image's path")
    stored = {
        "keys": np.array(arrays.keys, dtype=np.dtypes.StringDType()),
        "content_hash": arrays.content_hash,
        "class_id": arrays.class_id,
        "views": arrays.views,
    }
    for name in ("confidence", "draws", "head_ids", "head_logits", "head_confidence", "head_draws"):
        if getattr(arrays, name) is not None:
            stored[name] = getattr(arrays, name)
    if arrays.augmentation is not None:
        stored["augmentation"] = np.array(arrays.augmentation, dtype=np.dtypes.StringDType())
    stored |= to_q8(arrays, spec) if spec.encoding == "q8" else {"class_ids": arrays.class_ids, "logits": arrays.logits}
    planes = layout(spec, len(arrays))
    stored = {
        name: _to_half(array) if array.dtype.kind == "f" and name != "views" else array
        for name, array in stored.items()
        if name in planes
    }
    for name in ("logits", "head_logits", "confidence", "head_confidence"):
        values = stored.get(name)
        if values is not None and not (np.isfinite(values) if "logits" in name else values > 0).all():
            raise FormatError("a logit or a confidence is beyond float16; scale the labeler's logits")
    return stored


def from_stored(stored: dict[str, np.ndarray], spec: LabelSpec) -> ShardArrays:
    """The inverse of `to_stored`; checks every value, raises FormatError."""
    n = len(stored["keys"])
    values = stored | (from_q8(stored, spec) if spec.encoding == "q8" else {})
    if not spec.top_k:
        values["class_ids"] = np.empty((n, *spec.map_shape), dtype=spec.id_dtype)
        values["logits"] = np.empty((n, *spec.map_shape), dtype="<f2")
    names = {field.name for field in fields(ShardArrays)}
    texts = {name: values[name].tolist() for name in ("keys", "augmentation") if name in values}
    return ShardArrays(**{name: value for name, value in (values | texts).items() if name in names}).check(spec)


def _to_half(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return values.astype("<f2", copy=False)
