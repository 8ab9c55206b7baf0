"""Arrays of a zarr shard straight from their chunks, for the one way in which version 1 stores them.

zarr itself reads the same (the tests compare them), through a group, a store, an event loop and a thread for each
chunk: milliseconds for each array, in which other threads wait. Here threads only share the processor.

The decoders below (blosc, zstd) take the lengths in a chunk's own header on trust: blosc reads as many bytes as the
header claims, whatever the chunk's real length. So every length is compared with the real one before a decoder starts.
"""

import math
import struct

import numpy as np
from numcodecs import Zstd, blosc

from stl_offline.errors import FormatError
from stl_offline.files import zstd_size
from stl_offline.labels.format.layout import MOST_KEY_BYTES

# version, version of the inner codec, flags, item size; then the bytes of content, of a block, and of the whole chunk
_BLOSC = struct.Struct("<BBBBIII")
_BLOSC_VERSION, _ZSTD_VERSION, _ZSTD = 2, 1, 4
# Of the flags: byte shuffle or bit shuffle, blocks that are not split. A stored (not compressed) chunk has one more.
_STORED, _HARMLESS_FLAGS = 0b0010, 0b0001_0101


def read_array(
    name: str, shape: tuple[int, ...], rows: int, dtype: np.dtype | None, entries: dict[str, bytes], most: int
) -> np.ndarray:
    """An array from its chunks, little-endian.

    Args:
        name: of the array in the group.
        shape: of the array.
        rows: length of a chunk along the first axis; its other axes are the array's.
        dtype: of the numbers in the chunks, either byte order; None for strings.
        entries: content by path; all chunks must be there.
        most: bytes that an array of strings may unpack to.

    Raises:
        FormatError: a chunk does not hold what it should.
        ValueError, RuntimeError: bytes that a codec refuses.
    """
    tail = "/0" * (len(shape) - 1)
    parts = [entries[f"{name}/c/{index}{tail}"] for index in range(math.ceil(shape[0] / rows))]
    if dtype is None:
        return _read_strings(name, parts, shape[0], rows, most)
    return _read_numbers(name, parts, shape, rows, dtype).astype(dtype.newbyteorder("<"), copy=False)


def _read_numbers(name: str, parts: list[bytes], shape: tuple[int, ...], rows: int, dtype: np.dtype) -> np.ndarray:
    row = dtype.itemsize * math.prod(shape[1:])
    # All of them before the memory for the array is taken.
    for index, part in enumerate(parts):
        fault = _blosc_fault(part, rows * row, dtype.itemsize)
        if fault:
            raise FormatError(f"the shard is damaged: chunk {index} of the array {name} {fault}")
    array = np.empty(shape, dtype=dtype)
    for index, part in enumerate(parts):
        target = array[index * rows : (index + 1) * rows]
        if len(target) == rows:
            blosc.decompress(part, target)
        else:
            # The last chunk is as large as the others; what lies past the array's end is nothing.
            whole = np.empty((rows, *shape[1:]), dtype=dtype)
            blosc.decompress(part, whole)
            target[:] = whole[: len(target)]
    return array


def _blosc_fault(part: bytes, size: int, itemsize: int) -> str:
    """What the header of a chunk that should unpack to ``size`` bytes has wrong; "" where it is sound.

    See c-blosc's README_CHUNK_FORMAT.rst.
    """
    if len(part) < _BLOSC.size:
        return f"has {len(part)} bytes, less than a header"
    version, codec_version, flags, items, content, block, whole = _BLOSC.unpack_from(part)
    if whole != len(part):
        return f"has {len(part):,} bytes, and its header claims {whole:,}"
    if content != size:
        return f"has another size: its header claims {content:,} bytes of content, expected {size:,}"
    if (version, codec_version, flags >> 5) != (_BLOSC_VERSION, _ZSTD_VERSION, _ZSTD):
        return "is not packed by blosc's zstd"
    if flags & 0b1_1111 & ~(_HARMLESS_FLAGS | _STORED) or items != itemsize:
        return "is packed as no label set is"
    if not 0 < block <= content:
        return f"has blocks of {block:,} bytes"
    if flags & _STORED:
        return "" if whole == content + _BLOSC.size else "is not as large as its content"
    # The start of each block, then for each at least the length of its one stream.
    blocks = -(-content // block)
    table = _BLOSC.size + 4 * blocks
    if table + 4 * blocks > whole:
        return f"claims {blocks:,} blocks, which its size cannot hold"
    starts = np.frombuffer(part, "<i4", blocks, _BLOSC.size)
    if (starts < table).any() or (starts > whole - 4).any():
        return "has a block outside of it"
    return ""


def _read_strings(name: str, parts: list[bytes], count: int, rows: int, most: int) -> np.ndarray:
    strings: list[str] = []
    claimed = 0.0
    for index, part in enumerate(parts):
        where = f"the shard is damaged: chunk {index} of the array {name}"
        size = zstd_size(part)
        claimed += size
        if claimed > most:
            raise FormatError(f"{where} claims an impossible size")
        # Of its own, the decoder would make room for whatever size the data claims, further frames included.
        unpacked = np.empty(int(size), dtype=np.uint8)
        Zstd().decode(part, unpacked)
        strings += _split_strings(unpacked.tobytes(), rows, where)
    return np.array(strings[:count], dtype=np.dtypes.StringDType())


def _split_strings(data: bytes, rows: int, where: str) -> list[str]:
    """zarr's vlen-utf8: the count, then each string after its length in bytes, all lengths as uint32."""
    if len(data) < 4 * (1 + rows) or struct.unpack_from("<I", data)[0] != rows:
        raise FormatError(f"{where} has another size")
    strings = []
    start, lengths = 4, struct.Struct("<I")
    for _ in range(rows):
        if start + 4 > len(data):
            raise FormatError(f"{where} ends within a string")
        end = start + 4 + lengths.unpack_from(data, start)[0]
        if end > start + 4 + MOST_KEY_BYTES:
            raise FormatError(f"{where} holds a string of {end - start - 4:,} bytes, more than {MOST_KEY_BYTES:,}")
        if end > len(data):
            raise FormatError(f"{where} holds a string that is longer than the chunk")
        strings.append(data[start + 4 : end].decode())
        start = end
    if start != len(data):
        raise FormatError(f"{where} holds more than its strings")
    return strings
