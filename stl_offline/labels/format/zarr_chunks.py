"""Arrays of a zarr shard straight from their chunks, for the one way in which version 1 stores them.

zarr itself reads the same (the tests compare them), through a group, a store, an event loop and a thread for each
chunk: milliseconds for each array, in which other threads wait. Here threads only share the processor.
"""

import math
import struct

import numpy as np
from numcodecs import VLenUTF8, Zstd, blosc

from stl_offline.errors import FormatError

# Keys unpack to a few times their size.
_HARMLESS_BYTES, _MOST_RATIO = 1 << 20, 300
_NUMBERS = ("bytes", "blosc")
_STRINGS = ("vlen-utf8", "zstd")


def read_array(name: str, metadata: dict, entries: dict[str, bytes]) -> np.ndarray | None:
    """An array from the entries of its chunks, all of which must be there; None where it is stored in another way.

    Raises:
        FormatError: a chunk does not hold what it should.
        ValueError, RuntimeError: bytes that a codec refuses.
    """
    shape, chunks = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = tuple(codec["name"] for codec in metadata["codecs"])
    plain = (metadata["zarr_format"], metadata["node_type"]) == (3, "array") and not metadata.get(
        "storage_transformers"
    )
    if not plain or chunks[1:] != shape[1:] or not shape or not chunks[0]:
        return None
    tail = "/0" * (len(shape) - 1)
    parts = [entries[f"{name}/c/{index}{tail}"] for index in range(math.ceil(shape[0] / chunks[0]))]
    if codecs == _STRINGS:
        return _read_strings(name, parts, shape[0], chunks[0])
    if codecs != _NUMBERS or metadata["codecs"][0].get("configuration", {}).get("endian", "little") != "little":
        return None
    return _read_numbers(name, parts, shape, chunks[0], np.dtype(metadata["data_type"]).newbyteorder("<"))


def _read_numbers(name: str, parts: list[bytes], shape: list[int], rows: int, dtype: np.dtype) -> np.ndarray:
    array = np.empty(shape, dtype=dtype)
    row = dtype.itemsize * math.prod(shape[1:])
    for index, part in enumerate(parts):
        if len(part) < 16 or struct.unpack_from("<I", part, 4)[0] != rows * row:
            raise FormatError(f"the shard is damaged: chunk {index} of the array {name} has another size")
        target = array[index * rows : (index + 1) * rows]
        if len(target) == rows:
            blosc.decompress(part, target)
        else:
            # The last chunk is as large as the others; what lies past the array's end is nothing.
            whole = np.empty((rows, *shape[1:]), dtype=dtype)
            blosc.decompress(part, whole)
            target[:] = whole[: len(target)]
    return array


def _read_strings(name: str, parts: list[bytes], count: int, rows: int) -> np.ndarray:
    strings: list[str] = []
    for index, part in enumerate(parts):
        # Both decoders make room for whatever size the data claims.
        if not _zstd_size(part) <= _HARMLESS_BYTES + _MOST_RATIO * len(part):
            raise FormatError(f"the shard is damaged: chunk {index} of the array {name} claims an impossible size")
        data = Zstd().decode(part)
        if len(data) < 4 or struct.unpack_from("<I", data)[0] != rows:
            raise FormatError(f"the shard is damaged: chunk {index} of the array {name} has another size")
        strings += VLenUTF8().decode(data).tolist()
    return np.array(strings[:count], dtype=np.dtypes.StringDType())


def _zstd_size(frame: bytes) -> float:
    """The size that a zstd frame says it unpacks to (RFC 8878, 3.1.1.1); infinite where it does not say."""
    if len(frame) < 6 or frame[:4] != b"\x28\xb5\x2f\xfd":
        return math.inf
    flag, is_single, dictionary = frame[4] >> 6, frame[4] >> 5 & 1, (0, 1, 2, 4)[frame[4] & 3]
    start = 5 + (0 if is_single else 1) + dictionary
    width = (1 if is_single else 0, 2, 4, 8)[flag]
    if not width:
        return math.inf
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
