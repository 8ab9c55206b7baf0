"""A label shard as a webdataset tar: one member for each sample, read with tar, gzip and numpy alone.

- ``__labels__``: JSON that says what the shard is. webdataset passes names of this form over.
- ``NAME.labels.npy.gz``, in sample order: a gzipped .npy file that holds one record (shape (), a structured dtype)
  whose fields are the sample's ``key`` (UTF-8) and its part of each array that the encoding stores. In version 2 it is
  ``NAME.labels.npz`` (`stl_offline.labels.format.npz_member`).

NAME is the key up to the first dot of its last part, as webdataset names an image's members, so that tars of labels
and of images can be joined. What webdataset could not read back, and what another sample is called already, is
written with ``%XX`` for its dots and leading underscores.
"""

import io
import json
import math
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, ShardIndex
from stl_offline.labels.format.layout import (
    MOST_KEY_BYTES,
    StoredArray,
    check_claim,
    from_stored,
    layout,
    most_key_bytes,
    to_stored,
)
from stl_offline.labels.format.npz_member import pack_member, sample_values, unpack_member
from stl_offline.labels.spec import FORMAT, MEMBER_SUFFIX, LabelSpec

_HEAD = "__labels__"
_SUFFIX = {version: f".{suffix}" for version, suffix in MEMBER_SUFFIX.items()}
_TEXT = np.dtypes.StringDType()
_BLOCK = 512
_LEVEL = 6
_GZIP_HEAD = b"\x1f\x8b\x08\x00" + bytes(4) + b"\x02\xff"
# Of a record's header (its arrays have sizes that the spec tells), and of a member's name: a key whose every dot and
# percent sign is written as %XX, a suffix and a zero byte.
_MOST_HEADER = 1 << 16
_MOST_NAME = 3 * MOST_KEY_BYTES + 64
_META = re.compile(r"__[^/]*__($|/)")
_KEY_LENGTH = re.compile(rb"'\|S(\d{1,6})'")
_PALETTE_LENGTH = re.compile(rb"'palette', '[^']*', \((\d{1,9}),\)")


def encode(arrays: ShardArrays, spec: LabelSpec) -> bytes:
    """The bytes of a shard's file.

    Raises:
        FormatError: the content does not fit the spec.
    """
    stored = to_stored(arrays, spec)
    planes = layout(spec, len(arrays))
    fields = _fields(planes)
    palettes = _palette_bounds(stored) if "palette" in planes else None
    head = {
        "format": FORMAT,
        "format_version": spec.format_version,
        "value_kind": spec.value_kind,
        "encoding": spec.encoding,
        "samples": len(arrays),
    }
    stream = io.BytesIO()
    _add(stream, _HEAD, json.dumps(head, separators=(",", ":")).encode())
    for sample, name in enumerate(member_names(arrays.keys)):
        key = arrays.keys[sample].encode()
        palette = slice(*palettes[sample : sample + 2]) if palettes is not None else slice(0, 0)
        if spec.format_version > 1:
            values = sample_values(planes, stored, sample)
            if palettes is not None:
                values["palette"] = stored["palette"][palette]
            member = pack_member({name: values[name] for name in _names(planes)})
            _add(stream, name + _SUFFIX[spec.format_version], member)
            continue
        header, dtype = _record(fields, len(key), palette.stop - palette.start)
        record = np.zeros((), dtype=dtype)
        for field in dtype.names:
            if field == "key":
                record[field] = key
            else:
                record[field] = stored[field][palette if field == "palette" else sample]
        _add(stream, name + _SUFFIX[1], _gzip(header + record.tobytes()))
    stream.write(bytes(2 * _BLOCK))
    return stream.getvalue()


def decode(source: bytes | str | Path, spec: LabelSpec) -> ShardArrays:
    """A shard's content from its file or its bytes, every value checked.

    Raises:
        FormatError: not a shard of this label set: damaged, cut off, of another version or encoding, or with a member
            of a foreign name.
    """
    records = _read_records(source, spec)
    planes = layout(spec, len(records))
    stored: dict[str, np.ndarray] = {"keys": _keys(records)}
    for name, plane in planes.items():
        if name == "palette":
            stored[name] = np.concatenate([record[name] for record in records])
        elif plane.dtype is None:
            stored.setdefault(name, np.array([str(record[name]) for record in records if name != "keys"], _TEXT))
        else:
            stored[name] = np.empty(plane.shape, dtype=plane.dtype)
            for sample, record in enumerate(records):
                stored[name][sample] = record[name].reshape(plane.shape[1:])
    return from_stored(stored, spec)


def read_index(source: bytes | str | Path, spec: LabelSpec) -> ShardIndex:
    """Keys, content hashes and class ids. Raises FormatError as `decode` does."""
    records = _read_records(source, spec)
    hashes, class_ids = (
        np.array([record[name].item() for record in records], dtype=dtype)
        for name, dtype in (("content_hash", "<u8"), ("class_id", "<u4"))
    )
    return ShardIndex(_keys(records).tolist(), hashes, class_ids)


def member_names(keys: list[str]) -> list[str]:
    """The names of the samples' members, without suffix: different ones, that webdataset takes as its keys."""
    names: list[str] = []
    taken: set[str] = set()
    for key in keys:
        folder, slash, last = key.rpartition("/")
        name = folder + slash + last.partition(".")[0]
        if name in taken or not last.partition(".")[0] or _META.match(name):
            name = re.sub(r"^__", "%5F%5F", folder + slash + last.replace("%", "%25").replace(".", "%2E"))
        while name in taken:  # of a key that looks like another one's name
            name += "%2E"
        taken.add(name)
        names.append(name)
    return names


def _palette_bounds(stored: dict[str, np.ndarray]) -> np.ndarray:
    """Where each image's list starts and ends in the palette: a list is as long as the greatest rank + 1."""
    parts = [stored[name] for name in ("class_ranks", "draw_ranks") if name in stored]
    sizes = np.max([ranks.reshape(len(ranks), -1).max(axis=1).astype(np.int64) + 1 for ranks in parts], axis=0)
    return np.concatenate([[0], np.cumsum(sizes)])


def _fields(planes: dict[str, StoredArray]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """Name, dtype and shape of every field but the key; the palette's length is a matter of the sample."""
    return tuple((name, array.dtype.str, array.shape[1:]) for name, array in planes.items() if array.dtype is not None)


@lru_cache(maxsize=1 << 16)
def _record(
    fields: tuple[tuple[str, str, tuple[int, ...]], ...], key_length: int, palette_length: int
) -> tuple[bytes, np.dtype]:
    """The .npy header of a sample's record, and its dtype."""
    described: list[tuple] = [("key", f"S{key_length}")]
    for name, dtype, shape in fields:
        if name == "palette":
            shape = (palette_length,)
        elif name == "class_ranks" and palette_length <= 256:
            dtype = "|u1"  # gzip, unlike zarr's codecs, pays for the empty half of larger numbers
        described.append((name, dtype, shape) if shape else (name, dtype))
    dtype = np.dtype(described)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((), dtype=dtype), version=(1, 0), allow_pickle=False)
    return stream.getvalue()[: len(stream.getvalue()) - dtype.itemsize], dtype


def _add(stream: io.BytesIO, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    stream.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict"))
    stream.write(data)
    stream.write(bytes(-len(data) % _BLOCK))


def _gzip(data: bytes) -> bytes:
    # By hand, because gzip's own header holds the clock and the operating system.
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, -15)
    return _GZIP_HEAD + packer.compress(data) + packer.flush() + struct.pack("<LL", zlib.crc32(data), len(data))


def _read_records(source: bytes | str | Path, spec: LabelSpec) -> list[Any]:
    """Each sample's arrays by name, in order: of version 1 a record, of version 2 a dict."""
    names: list[str] = []
    records: list[Any] = []
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        members = _members(data)
        samples = _check_head(next(members, None), spec)
        planes = layout(spec, samples)
        fields = _fields(planes)
        check_claim(spec, samples, len(data))
        most, suffix = _most_bytes(spec), _SUFFIX[spec.format_version]
        key_bytes = most_key_bytes(len(data))
        for name, content in members:
            if not name.endswith(suffix):
                raise FormatError(f"the shard holds a member that is no label: {name!r}")
            names.append(name.removesuffix(suffix))
            if spec.format_version > 1:
                records.append(unpack_member(content, planes, spec.classes_per_image))
                key_bytes -= sum(value.nbytes for value in records[-1].values() if value.dtype.kind == "U")
            else:
                records.append(_read_record(content, fields, most))
                key_bytes -= records[-1].dtype["key"].itemsize
            if key_bytes < 0:
                raise FormatError("the shard's keys are larger than any packed to its size")
    except FileNotFoundError as error:
        raise FormatError(f"the shard {source} is missing") from error
    except FormatError:
        raise
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        RecursionError,
        zlib.error,
        struct.error,
    ) as error:
        raise FormatError(f"the shard is damaged: {type(error).__name__}: {error}") from error
    if len(records) != samples:
        raise FormatError(f"the shard says that it holds {samples} samples, but has {len(records)}: it is cut off")
    for name, expected in zip(names, member_names(_keys(records).tolist()), strict=True):
        if name != expected:
            raise FormatError(f"the shard's member {name!r} is not named after its key ({expected!r}): refused")
    return records


def _members(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member, in order.

    Only what version 1 writes is followed: regular files, and GNU's member for a name of more than 100 bytes. tarfile
    itself would carry out links, sparse maps and pax headers, whose claimed sizes may be anything (and negative ones
    keep some of its versions from ever ending).
    """
    if len(data) % _BLOCK or not data.endswith(bytes(2 * _BLOCK)):
        raise FormatError("the shard is no whole tar file: its end is missing")
    start, long_name = 0, None
    while (block := data[start : start + _BLOCK]) and block != bytes(_BLOCK):
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        content = data[start + _BLOCK : start + _BLOCK + max(0, info.size)]
        if info.size < 0 or len(content) != info.size:
            raise FormatError(f"the shard's member {info.name!r} claims {info.size:,} bytes, more than follow it")
        start += _BLOCK + info.size + -info.size % _BLOCK
        if info.type == tarfile.GNUTYPE_LONGNAME and long_name is None and info.size <= _MOST_NAME:
            long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.REGTYPE:
            yield info.name if long_name is None else long_name, content
            long_name = None
        else:
            raise FormatError(f"the shard holds a member that is no label: {info.name!r}")
    if long_name is not None or data.count(0, start) != len(data) - start:
        raise FormatError("the shard is no whole tar file: bytes follow its end")


def _check_head(member: tuple[str, bytes] | None, spec: LabelSpec) -> int:
    """How many samples the shard says it holds."""
    if member is None or member[0] != _HEAD or len(member[1]) > 4096:
        raise FormatError("the shard is no label shard: it does not start with " + _HEAD)
    head = json.loads(member[1])
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise FormatError("the shard is no label shard")
    for name in ("format_version", "value_kind", "encoding"):
        if head.get(name) != getattr(spec, name):
            raise FormatError(f"the shard's {name} is {head.get(name)!r}, the manifest's is {getattr(spec, name)!r}")
    if type(head.get("samples")) is not int or head["samples"] < 1:
        raise FormatError("the shard does not say how many samples it holds")
    return head["samples"]


def _most_bytes(spec: LabelSpec) -> int:
    """Larger than any record of this label set."""
    planes = layout(spec, 1)
    arrays = sum(array.dtype.itemsize * math.prod(array.shape) for array in planes.values() if array.is_sized)
    palette = spec.id_dtype.itemsize * spec.classes_per_image if "palette" in planes else 0
    return arrays + palette + _MOST_HEADER + MOST_KEY_BYTES


def _read_record(data: bytes, fields: tuple, most: int) -> np.void:
    """One sample's record. Only the very header that version 1 writes is taken: a foreign dtype is never built."""
    unpacker = zlib.decompressobj(16 + zlib.MAX_WBITS)
    data = unpacker.decompress(data, most)
    # At its end zlib has compared the checksum and the length.
    if not unpacker.eof or unpacker.unused_data:
        raise FormatError("the shard holds a label that is cut off, or is larger than any of this label set")
    key = _KEY_LENGTH.search(data, 0, 4096)
    palette = _PALETTE_LENGTH.search(data, 0, 4096)
    if key is None:
        raise FormatError("the shard holds a label without a key")
    if int(key[1]) > MOST_KEY_BYTES:
        raise FormatError(f"the shard holds a key of {int(key[1]):,} bytes, more than {MOST_KEY_BYTES:,}")
    if max(int(key[1]), int(palette[1]) if palette else 0) > len(data):
        raise FormatError("the shard holds a label that claims to be longer than it is")
    header, dtype = _record(fields, int(key[1]), int(palette[1]) if palette else 0)
    if not data.startswith(header) or len(data) != len(header) + dtype.itemsize:
        raise FormatError("the shard holds a label of another shape, or of another label set")
    return np.frombuffer(data, dtype=dtype, count=1, offset=len(header))[0]


def _names(planes: dict[str, StoredArray]) -> list[str]:
    return ["key" if name == "keys" else name for name in planes]


def _keys(records: list[Any]) -> np.ndarray:
    keys = (record["key"].item() for record in records)
    try:
        return np.array([key.decode() if isinstance(key, bytes) else key for key in keys], dtype=_TEXT)
    except UnicodeDecodeError as error:
        raise FormatError(f"the shard holds a key that is not UTF-8: {error.object!r}") from error
