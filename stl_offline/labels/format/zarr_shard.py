"""A label shard as a zarr v3 group in an uncompressed zip: whole shards to bytes, and back.

The same content gives the same bytes: a memory store is filled first, then zipped in sorted order with fixed dates,
because zarr's own ZipStore writes entries in the order in which its workers end, dated by the clock.
"""

import io
import json
import math
import re
import struct
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import zarr
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, ZstdCodec
from zarr.storage import MemoryStore

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, ShardIndex
from stl_offline.labels.format.layout import StoredArray, check_claim, from_stored, layout, to_stored
from stl_offline.labels.format.zarr_chunks import read_array
from stl_offline.labels.spec import FORMAT, LabelSpec

# Codecs that a reader accepts: all that version 1 uses. A foreign codec is foreign code.
_CODECS = {False: ["bytes", "blosc"], True: ["vlen-utf8", "zstd"]}  # of numbers, and of strings
# A chunk's size before compression. Larger chunks read faster and are smaller; a chunk is what plain zarr reads to
# give one sample.
_CHUNK_BYTES = 1 << 20
_ENTRY = re.compile(r"zarr\.json|[a-z_]+/(zarr\.json|c(/[0-9]+)+)")
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


def encode(arrays: ShardArrays, spec: LabelSpec) -> bytes:
    """The bytes of a shard's file.

    Raises:
        FormatError: the content does not fit the spec.
    """
    stored = to_stored(arrays, spec)
    chunks: dict[str, cpu.Buffer] = {}
    attributes = {
        "format": FORMAT,
        "format_version": spec.format_version,
        "value_kind": spec.value_kind,
        "encoding": spec.encoding,
    }
    group = zarr.create_group(store=MemoryStore(chunks), zarr_format=3, attributes=attributes)
    for name, array in layout(spec, len(arrays)).items():
        _create(group, name, array, stored[name].shape)[...] = stored[name]
    return _zip({name: _settled(name, value.to_bytes()) for name, value in chunks.items()})


def _settled(name: str, data: bytes) -> bytes:
    """Metadata without line breaks. zarr's own setting for it is one for all threads, which may be encoding, too."""
    return json.dumps(json.loads(data)).encode() if name.endswith("zarr.json") else data


def decode(source: bytes | str | Path, spec: LabelSpec) -> ShardArrays:
    """A shard's content from its file or its bytes, every value checked.

    Raises:
        FormatError: not a shard of this label set: damaged, of another version or encoding, or with an array or a
            chunk missing (which zarr alone would read as zeros).
    """
    return from_stored(read_stored(source, spec), spec)


def read_index(source: bytes | str | Path, spec: LabelSpec) -> ShardIndex:
    """Keys, content hashes and class ids, without reading the labels. Raises FormatError as `decode` does."""
    stored = read_stored(source, spec, ("keys", "content_hash", "class_id"))
    return ShardIndex(stored["keys"].tolist(), stored["content_hash"], stored["class_id"])


def read_stored(
    source: bytes | str | Path, spec: LabelSpec, names: tuple[str, ...] | None = None
) -> dict[str, np.ndarray]:
    """The arrays as they are stored, by name; all of them, or only ``names``. Raises FormatError as `decode` does."""
    entries = _unzip(source, names)
    try:
        metadata = {name: json.loads(data) for name, data in entries.items() if name.endswith("zarr.json")}
        _check_group(metadata, spec)
        samples = int(metadata["keys/zarr.json"]["shape"][0])
        # Every sample has a hash of its own; so fewer bytes than samples are a lie that would only cost memory.
        if not 0 < samples <= sum(map(len, entries.values())):
            raise FormatError(f"the shard claims {samples} samples, which its size cannot hold")
        check_claim(spec, samples, len(source) if isinstance(source, bytes) else Path(source).stat().st_size)
        expected = {name: array for name, array in layout(spec, samples).items() if names is None or name in names}
        for name, array in expected.items():
            _check_array(name, array, metadata.get(f"{name}/zarr.json"), entries)
        stored = {name: read_array(name, metadata[f"{name}/zarr.json"], entries) for name in expected}
        others = [name for name, values in stored.items() if values is None]
        return stored | _read_by_zarr(entries, others) if others else stored
    except FormatError:
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        # Whatever zarr and its codecs raise on bytes that are no array of theirs.
        raise FormatError(f"the shard is damaged: {type(error).__name__}: {error}") from error


def _read_by_zarr(entries: dict[str, bytes], names: list[str]) -> dict[str, np.ndarray]:
    """Arrays that are stored in another way than the writer here stores them."""
    store = MemoryStore({name: cpu.Buffer.from_bytes(data) for name, data in entries.items()}, read_only=True)
    group = zarr.open_group(store=store, mode="r", zarr_format=3)
    return {name: np.asarray(group[name][...]) for name in names}


def _create(group: zarr.Group, name: str, array: StoredArray, shape: tuple[int, ...]) -> zarr.Array:
    if array.dtype is None:
        item = 32
        dtype, compressor = "string", ZstdCodec(level=array.level)
    else:
        item = array.dtype.itemsize
        dtype = array.dtype
        compressor = BloscCodec(typesize=item, cname="zstd", clevel=array.level, shuffle=array.shuffle)
    row = item * max(1, math.prod(shape[1:]))
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(min(shape[0], max(1, _CHUNK_BYTES // row)), *shape[1:]),
        compressors=[compressor],
        dimension_names=array.axes,
        config={"write_empty_chunks": True},
    )


def _zip(entries: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(entries):
            info = zipfile.ZipInfo(name, _ZIP_DATE)
            info.create_system = 3
            info.external_attr = 0o100644 << 16
            archive.writestr(info, entries[name])
    return stream.getvalue()


def _unzip(source: bytes | str | Path, names: tuple[str, ...] | None) -> dict[str, bytes]:
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with zipfile.ZipFile(stream) as archive:
            entries: dict[str, bytes] = {}
            size = stream.getbuffer().nbytes if isinstance(stream, io.BytesIO) else Path(stream).stat().st_size
            if sum(info.file_size for info in archive.infolist()) > size:
                raise FormatError("the shard's entries overlap: together they are larger than the file")
            for info in archive.infolist():
                if not _ENTRY.fullmatch(info.filename):
                    raise FormatError(f"the shard holds an entry that is no label's: {info.filename!r}")
                if info.compress_type != zipfile.ZIP_STORED or info.filename in entries:
                    raise FormatError(f"the shard's entry {info.filename} is compressed or there twice")
                array = info.filename.partition("/")[0]
                if names is None or info.filename.endswith("zarr.json") or array in names:
                    entries[info.filename] = archive.read(info)
            return entries
    except FileNotFoundError as error:
        raise FormatError(f"the shard {source} is missing") from error
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, RuntimeError, struct.error) as error:
        # All that the zip module raises on bytes that are no zip, or one of a kind that it cannot read: encrypted
        # (RuntimeError), of a newer version or an unknown compression (NotImplementedError, a RuntimeError too).
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"the shard is no whole zip file: {error}") from error


def _check_group(metadata: dict[str, dict], spec: LabelSpec) -> None:
    group = metadata.get("zarr.json", {})
    attributes = group.get("attributes", {})
    if (group.get("zarr_format"), group.get("node_type"), attributes.get("format")) != (3, "group", FORMAT):
        raise FormatError("the shard is no label shard")
    for name in ("format_version", "value_kind", "encoding"):
        if attributes.get(name) != getattr(spec, name):
            raise FormatError(
                f"the shard's {name} is {attributes.get(name)!r}, the manifest's is {getattr(spec, name)!r}"
            )
    if "keys/zarr.json" not in metadata:
        raise FormatError("the shard lacks the array keys")


def _check_array(name: str, array: StoredArray, metadata: dict | None, entries: dict[str, bytes]) -> None:
    if metadata is None:
        raise FormatError(f"the shard lacks the array {name}")
    dtype = "string" if array.dtype is None else array.dtype.name
    shape = tuple(metadata["shape"])
    wanted = tuple(length if side is None else side for side, length in zip(array.shape, shape, strict=False))
    if metadata["data_type"] != dtype or shape != wanted or len(shape) != len(array.shape):
        raise FormatError(
            f"the shard's array {name} is {metadata['data_type']} {shape}, expected {dtype} {array.shape}"
        )
    codecs = [codec["name"] for codec in metadata["codecs"]]
    foreign = codecs if codecs != _CODECS[array.dtype is None] else []
    grid, keys = metadata["chunk_grid"], metadata["chunk_key_encoding"]
    if foreign or grid["name"] != "regular" or keys != {"name": "default", "configuration": {"separator": "/"}}:
        raise FormatError(f"the shard's array {name} is stored as version 1 never does: {foreign or grid}")
    chunks = grid["configuration"]["chunk_shape"]
    if not all(type(chunk) is int and 1 <= chunk <= max(1, side) for chunk, side in zip(chunks, shape, strict=True)):
        raise FormatError(f"the shard's array {name} has chunks of an impossible shape: {chunks}")
    counts = [math.ceil(side / chunk) for side, chunk in zip(shape, chunks, strict=True)]
    if math.prod(counts) > len(entries):
        raise FormatError(f"the shard lacks chunks of the array {name}: it has {len(entries)} entries in all")
    for place in product(*map(range, counts)):
        if "/".join([name, "c", *map(str, place)]) not in entries:
            raise FormatError(f"the shard lacks chunk {place} of the array {name}")
