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
from pathlib import Path

import numpy as np
import zarr
from zarr.buffer import cpu
from zarr.codecs import BloscCodec, BytesCodec, ZstdCodec
from zarr.storage import MemoryStore

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, ShardIndex
from stl_offline.labels.format.layout import StoredArray, check_claim, from_stored, layout, most_key_bytes, to_stored
from stl_offline.labels.format.zarr_chunks import read_array
from stl_offline.labels.spec import FORMAT, LabelSpec

# A chunk's size before compression. Larger chunks read faster and are smaller; a chunk is what plain zarr reads to
# give one sample.
_CHUNK_BYTES = 1 << 20
_ENTRY = re.compile(r"zarr\.json|[a-z_]+/(zarr\.json|c(/[0-9]+)+)")
# That of an array has some 600 bytes. Larger ones would take 40 times their size as JSON values.
_MOST_METADATA_BYTES = 1 << 14
_UTF8_NAME = 0x800  # the only flag of an entry that changes nothing about its bytes
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
    separators = (", ", ": ") if spec.format_version == 1 else (",", ":")
    return _zip({name: _settled(name, value.to_bytes(), separators) for name, value in chunks.items()})


def _settled(name: str, data: bytes, separators: tuple[str, str]) -> bytes:
    """Metadata without line breaks. zarr's own setting for it is one for all threads, which may be encoding, too."""
    return json.dumps(json.loads(data), separators=separators).encode() if name.endswith("zarr.json") else data


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
    entries, paths = _unzip(source, names)
    try:
        metadata = {path: json.loads(data) for path, data in entries.items() if path.endswith("zarr.json")}
        _check_group(metadata, spec)
        samples = metadata["keys/zarr.json"]["shape"][0]
        if type(samples) is not int:
            raise FormatError(f"the shard claims {samples!r} samples, which is no count")
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
        check_claim(spec, samples, size)
        expected = layout(spec, samples)
        own = {"zarr.json"}
        chunks: dict[str, tuple[tuple[int, ...], int, np.dtype | None]] = {}
        for name, array in expected.items():
            chunks[name] = _check_array(name, array, metadata.get(f"{name}/zarr.json"), spec, samples)
            own |= {f"{name}/zarr.json", *_chunk_paths(name, *chunks[name][:2], paths)}
        if others := paths - own:
            raise FormatError(f"the shard holds {min(others)}, which belongs to no array of this label set")
        return {
            name: read_array(name, *chunks[name], entries, most_key_bytes(size))
            for name in expected
            if names is None or name in names
        }
    except FormatError:
        raise
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        OSError,
    ) as error:
        # Whatever metadata of other types lead to, and codecs raise on bytes that are no chunk of theirs.
        raise FormatError(f"the shard is damaged: {type(error).__name__}: {error}") from error


def _create(group: zarr.Group, name: str, array: StoredArray, shape: tuple[int, ...]) -> zarr.Array:
    if array.dtype is None:
        item = 32
        dtype, serializer, compressor = "string", "auto", ZstdCodec(level=array.level)
    else:
        item = array.dtype.itemsize
        dtype = array.dtype
        serializer = BytesCodec(endian=array.endian) if item > 1 else "auto"
        compressor = BloscCodec(typesize=item, cname="zstd", clevel=array.level, shuffle=array.shuffle)
    row = item * max(1, math.prod(shape[1:]))
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=(min(shape[0], max(1, _CHUNK_BYTES // row)), *shape[1:]),
        serializer=serializer,
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


def _unzip(source: bytes | str | Path, names: tuple[str, ...] | None) -> tuple[dict[str, bytes], set[str]]:
    """Content by path (of ``names`` only: chunks of other arrays are left out), and the paths of all entries."""
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with zipfile.ZipFile(stream) as archive:
            entries: dict[str, bytes] = {}
            paths: set[str] = set()
            size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
            # Entries that share bytes would unpack to many times the file.
            if sum(info.file_size for info in archive.infolist()) > size:
                raise FormatError("the shard's entries overlap: together they are larger than the file")
            for info in archive.infolist():
                if not _ENTRY.fullmatch(info.filename):
                    raise FormatError(f"the shard holds an entry that is no label's: {info.filename!r}")
                if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                    raise FormatError(f"the shard's entry {info.filename} is compressed")
                if info.flag_bits & ~_UTF8_NAME:
                    raise FormatError(f"the shard's entry {info.filename} is encrypted or has other flags")
                if info.filename in paths:
                    raise FormatError(f"the shard's entry {info.filename} is there twice")
                paths.add(info.filename)
                array, is_metadata = info.filename.partition("/")[0], info.filename.endswith("zarr.json")
                if is_metadata and info.file_size > _MOST_METADATA_BYTES:
                    raise FormatError(
                        f"the shard's {info.filename} has {info.file_size:,} bytes, more than {_MOST_METADATA_BYTES:,}"
                    )
                if names is None or is_metadata or array in names:
                    entries[info.filename] = archive.read(info)
            return entries, paths
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


def _check_array(
    name: str, array: StoredArray, metadata: dict | None, spec: LabelSpec, samples: int
) -> tuple[tuple[int, ...], int, np.dtype | None]:
    """The array's shape, the length of its chunks along the first axis, and the dtype in them (None for strings).

    Refuses every way of storing that no writer of label sets uses: what a general reader of zarr would carry out
    (other byte orders, other codecs, transformers of the store) has costs and lengths that nothing here checks.
    """
    if metadata is None:
        raise FormatError(f"the shard lacks the array {name}")
    dtype = "string" if array.dtype is None else array.dtype.name
    shape = tuple(metadata["shape"])
    if any(type(length) is not int for length in shape):
        raise FormatError(f"the shard's array {name} has the shape {shape}")
    wanted = tuple(length if side is None else side for side, length in zip(array.shape, shape, strict=False))
    if metadata["data_type"] != dtype or shape != wanted or len(shape) != len(array.shape):
        raise FormatError(
            f"the shard's array {name} is {metadata['data_type']} {shape}, expected {dtype} {array.shape}"
        )
    # The one array whose length is not a matter of the sample count: a list of classes has an entry per rank at most.
    if not array.is_sized and array.dtype is not None and not 0 < shape[0] <= samples * spec.classes_per_image:
        raise FormatError(f"the shard's array {name} claims {shape[0]:,} entries, more than its images name")
    if (metadata["zarr_format"], metadata["node_type"]) != (3, "array"):
        raise FormatError(f"the shard's {name} is no array of zarr version 3")
    stored = {
        "codecs": _are_own_codecs(metadata["codecs"], array),
        "chunk_key_encoding": metadata["chunk_key_encoding"]
        == {"name": "default", "configuration": {"separator": "/"}},
        "storage_transformers": metadata.get("storage_transformers", []) == [],
        "fill_value": metadata["fill_value"] == ("" if array.dtype is None else 0),
        "chunk_grid": metadata["chunk_grid"].keys() == {"name", "configuration"}
        and metadata["chunk_grid"]["name"] == "regular",
    }
    for part, is_own in stored.items():
        if not is_own:
            raise FormatError(f"the shard's array {name} is stored as no label set is: {part} {metadata[part]}")
    rows, *others = metadata["chunk_grid"]["configuration"]["chunk_shape"]
    if type(rows) is not int or not 1 <= rows <= shape[0] or others != list(shape[1:]):
        raise FormatError(f"the shard's array {name} has chunks of an impossible shape: {[rows, *others]}")
    if array.dtype is None:
        return shape, rows, None
    order = (metadata["codecs"][0].get("configuration") or {}).get("endian", "little")
    return shape, rows, array.dtype.newbyteorder(order)


def _are_own_codecs(codecs: list[dict], array: StoredArray) -> bool:
    """Whether a chain of codecs is a label set's. How hard the packer tries is the writer's choice."""
    dtype = array.dtype
    if len(codecs) != 2 or any(codec.keys() - {"name", "configuration"} for codec in codecs):
        return False
    (first, packer), settings = codecs, [codec.get("configuration") or {} for codec in codecs]
    if dtype is None:
        return (first["name"], packer["name"]) == ("vlen-utf8", "zstd") and settings[0] == {}
    # Single draws were little-endian at first, as all other arrays are.
    orders = [{"endian": "little"}, {"endian": array.endian} if dtype.itemsize > 1 else {}]
    return (
        (first["name"], packer["name"]) == ("bytes", "blosc")
        and settings[0] in orders
        and (settings[1].get("cname"), settings[1].get("typesize")) == ("zstd", dtype.itemsize)
    )


def _chunk_paths(name: str, shape: tuple[int, ...], rows: int, paths: set[str]) -> list[str]:
    """The paths of an array's chunks, all of which must be among ``paths``: zarr alone reads a missing one as zeros."""
    count = math.ceil(shape[0] / rows)
    if count > len(paths):
        raise FormatError(f"the shard lacks chunks of the array {name}: it has {len(paths)} entries in all")
    tail = "/0" * (len(shape) - 1)
    own = [f"{name}/c/{index}{tail}" for index in range(count)]
    for index, path in enumerate(own):
        if path not in paths:
            raise FormatError(f"the shard lacks chunk {index} of the array {name}")
    return own
