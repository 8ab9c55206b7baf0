"""Packed images: a .beton that stock FFCV reads, with keys and class names inside.

FFCV's own writer gives each image to whichever worker is free, waits forever when a worker dies, and has no place for
keys. This one writes in order, so equal images give equal bytes. The layout is FFCV's (``ffcv.types``),
little-endian:

    header │ 4 field descriptors │ n metadata records │ zeros up to a page │ pages │ index │ allocation table

The fields are ``image``, ``class_id``, ``key_hash`` and ``content_hash`` (hashes: the uint64's bits as int64). An
image's bytes lie within one page. The index is zstd-compressed JSON; where it lies stands in the ``class_id``
descriptor's ``arguments``, which FFCV leaves unread:

    "STLINDEX" │ version u32 │ zero u32 │ offset u64 │ size u64 │ xxh3_64 of the index u64 │ xxh3_64 of the metadata u64

The index holds ``class_names``, ``keys``, ``source``, ``fingerprint`` and ``converted``: the ``rows`` of images whose
stored bytes are not their source's, and the ``xxh3`` of what is stored of them. For all others that is the content
hash, so the bytes of every image can be checked. Files of earlier releases lack ``converted``.

n: images.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from ffcv.fields import IntField, RGBImageField
from ffcv.types import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    get_metadata_type,
)
from numcodecs import Zstd

from stl_offline.errors import FormatError, InputError
from stl_offline.files import images_fingerprint, zstd_size
from stl_offline.images.common import check_text
from stl_offline.images.encode import EncodedImage, decode_jpeg, key_hash

PAGE_SIZE = 8 << 20
# Rows that are made at first where the number of images is not known.
_FIRST_CAPACITY = 1024
MIN_PAGE_SIZE = 2 << 20
INDEX_VERSION = 1

_FIELDS = {"image": RGBImageField(), "class_id": IntField(), "key_hash": IntField(), "content_hash": IntField()}
_METADATA_TYPE = get_metadata_type(list(_FIELDS.values()))
_IMAGE, _CLASS_ID, _KEY_HASH, _CONTENT_HASH = _METADATA_TYPE.names
_METADATA_START = HeaderType.itemsize + len(_FIELDS) * FieldDescType.itemsize
_MODES = {"jpg": 0, "raw": 1}  # as in ffcv.fields.rgb_image.IMAGE_MODES
_INDEX_MAGIC = b"STLINDEX"
# What an index unpacks to, at most: class names, and each image's key.
_INDEX_BYTES, _INDEX_BYTES_PER_IMAGE = 1 << 26, 1 << 17
_INDEX_PLACE = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("zero", "<u4"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("index_xxh3", "<u8"),
        ("metadata_xxh3", "<u8"),
    ]
)


@dataclass(frozen=True, eq=False)
class Beton:
    """A packed data set, opened: everything but the pixels, which FFCV reads.

    path: the file; place: what the user named, for messages: the images that were packed into ``path``, or ``path``.
    keys: n names, in order; class_ids (n,) int64, each below ``len(class_names)``; key_hashes, content_hashes (n,)
    uint64; heights, widths (n,) int64, pixels; raw (n,) bool: stored as pixels; pointers, sizes (n,) int64: where in
    the file, bytes; source: how it was packed; fingerprint: sha256 over class names, keys, class ids, content hashes;
    stored_hashes: (n,) uint64, xxh3_64 of the stored bytes, None in files of releases that did not keep them.
    """

    path: Path
    keys: list[str]
    class_names: tuple[str, ...]
    class_ids: np.ndarray
    key_hashes: np.ndarray
    content_hashes: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    raw: np.ndarray
    pointers: np.ndarray
    sizes: np.ndarray
    source: dict[str, Any]
    fingerprint: str
    stored_hashes: np.ndarray | None
    place: str

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def max_size(self) -> int | None:
        """Pixels that the longer side of an image has at most, where images were shrunk when they were packed."""
        return self.source.get("max_size")

    @property
    def state(self) -> dict[str, Any]:
        """What a job depends on of these images: the source's, and how far they were shrunk."""
        shrunk = {} if self.max_size is None else {"max_size": self.max_size}
        return {"fingerprint": self.fingerprint, "samples": len(self)} | shrunk

    def stored_bytes(self, index: int) -> bytes:
        """What is stored of an image: a JPEG file, or its pixels where ``raw``."""
        with open(self.path, "rb") as stream:
            stream.seek(int(self.pointers[index]))
            return stream.read(int(self.sizes[index]))

    def read_image(self, index: int) -> np.ndarray:
        """A whole image as RGB uint8 (H, W, 3), decoded as training decodes it.

        Raises:
            FormatError: the stored bytes are damaged.
            InputError: the image is larger than what fits into memory, or a damaged size makes it so.
        """
        height, width = int(self.heights[index]), int(self.widths[index])
        data = self.stored_bytes(index)
        if self.stored_hashes is not None and xxhash.xxh3_64_intdigest(data) != self.stored_hashes[index]:
            raise self.damaged(index, "its bytes changed since packing")
        if self.raw[index]:
            if len(data) != height * width * 3:
                raise self.damaged(index, "the file ends within it")
            return np.frombuffer(data, np.uint8).reshape(height, width, 3).copy()
        try:
            pixels, complaint = decode_jpeg(data, width, height)
        except MemoryError:
            raise InputError(
                f"{self.path}: the image {self.keys[index]!r} has {width:,} × {height:,} pixels, which do not fit into "
                "memory; if it is smaller, the file is damaged: pack the images again"
            ) from None
        if complaint:
            raise self.damaged(index, complaint)
        return pixels

    def damaged(self, index: int, reason: str) -> FormatError:
        """The error for an image whose stored bytes cannot be used."""
        return FormatError(f"{self.path}: the image {self.keys[index]!r} is damaged: {reason}; pack the images again")

    def require_classes(self) -> None:
        """Raise `InputError` where there is nothing to tell apart: fewer than two classes."""
        if len(self.class_names) < 2:
            raise InputError(
                f"{self.place} has only one class ({self.class_names[0]!r}); training takes two: "
                "give a folder that has one folder of images per class"
            )


class BetonWriter:
    """Writes a .beton into a new binary file, in the order of `add`. Not for several threads.

    Args:
        stream: open for writing and, without a capacity, for reading; empty, seekable.
        capacity: images at most; room for their metadata is kept before the first page. None: not known. Then the
            pages are moved at the end if their metadata need more than a page. The file is the same.
        page_size: bytes, a power of two from 2 MiB; no stored image can be bigger.
    """

    def __init__(self, stream: IO[bytes], capacity: int | None, page_size: int = PAGE_SIZE) -> None:
        if page_size < MIN_PAGE_SIZE or page_size >= 1 << 32 or page_size & (page_size - 1):
            raise InputError(f"the page size must be a power of two from {MIN_PAGE_SIZE:,} bytes, got {page_size:,}")
        self._stream = stream
        self._grows = capacity is None
        capacity = _FIRST_CAPACITY if capacity is None else capacity
        self._page_size = page_size
        self._page = bytearray()
        self._page_start = self._first_page = self._room(capacity)
        self._metadata = np.zeros(capacity, _METADATA_TYPE)
        self._allocations = np.zeros(capacity, ALLOC_TABLE_TYPE)
        self._keys: list[str] = []
        self._converted: dict[int, int] = {}
        stream.seek(self._page_start)  # a hole: reads as zeros, costs no disk

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str, class_id: int, image: EncodedImage) -> None:
        """Append one image.

        Raises:
            InputError: it does not fit into a page, there are more images than were announced, or the key cannot be
                stored (`check_text`).
        """
        check_text(key, "key")
        row, size = len(self._keys), len(image.data)
        if row == len(self._metadata):
            if not self._grows:
                raise InputError(f"the source announced {row:,} images but gave more; does it change?")
            # Twice as many; row by row they would be copied each time.
            self._metadata, self._allocations = _doubled(self._metadata), _doubled(self._allocations)
        if size > self._page_size:
            raise InputError(
                f"{key}: {size:,} bytes are more than a page of {self._page_size:,} bytes holds; "
                "shrink images with `max_size`"
            )
        if len(self._page) + size > self._page_size:
            self._flush()
        pointer = self._page_start + len(self._page)
        self._page += image.data
        self._metadata[row] = (
            (_MODES[image.mode], image.width, image.height, pointer),
            class_id,
            _signed(key_hash(key)),
            _signed(image.content_hash),
        )
        self._allocations[row] = (row, pointer, size)
        self._keys.append(key)
        if not image.as_is:
            self._converted[row] = xxhash.xxh3_64_intdigest(image.data)

    def finish(
        self, class_names: tuple[str, ...], source: dict[str, Any], classes: Mapping[str, int] | None = None
    ) -> None:
        """Write what stands around the pages; the file is complete after this.

        Args:
            classes: each key's class, where it was not known before; in place of what `add` was given.
        """
        count = len(self._keys)
        self._flush()
        metadata = self._metadata[:count]
        if classes is not None:
            metadata[_CLASS_ID] = [classes[key] for key in self._keys]
        if self._grows:
            self._move_pages(self._room(count) - self._first_page)
        index = {
            "class_names": list(class_names),
            "converted": {"rows": list(self._converted), "xxh3": list(self._converted.values())},
            "fingerprint": images_fingerprint(
                class_names,
                json.dumps(self._keys).encode(),
                metadata[_CLASS_ID].tobytes(),
                metadata[_CONTENT_HASH].tobytes(),
            ),
            "keys": self._keys,
            "source": source,
        }
        packed = Zstd(level=3).encode(json.dumps(index, sort_keys=True, separators=(",", ":")).encode())
        place = np.zeros(1, _INDEX_PLACE)
        place[0] = (
            _INDEX_MAGIC,
            INDEX_VERSION,
            0,
            self._page_start,
            len(packed),
            xxhash.xxh3_64_intdigest(packed),
            xxhash.xxh3_64_intdigest(metadata.tobytes()),
        )
        self._stream.write(packed)
        self._stream.write(self._allocations[:count].tobytes())
        self._stream.seek(0)
        self._stream.write(_header(count, self._page_size, self._page_start + len(packed)))
        self._stream.write(_field_descriptors(place))
        self._stream.write(metadata.tobytes())
        self._stream.flush()

    def _room(self, count: int) -> int:
        """Where the first page of a file of so many images begins."""
        return _round_up(_METADATA_START + count * _METADATA_TYPE.itemsize, self._page_size)

    def _move_pages(self, by: int) -> None:
        """Move all pages towards the end of the file by so many bytes, whole pages; the last one first."""
        if not by:
            return
        for start in range(self._page_start - self._page_size, self._first_page - 1, -self._page_size):
            self._stream.seek(start)
            page = self._stream.read(self._page_size)
            self._stream.seek(start + by)
            self._stream.write(page)
        self._stream.seek(self._first_page)
        for _ in range(by // self._page_size):
            self._stream.write(bytes(self._page_size))
        self._page_start += by
        self._metadata[_IMAGE]["data_ptr"][: len(self._keys)] += np.uint64(by)
        self._allocations["ptr"][: len(self._keys)] += np.uint64(by)
        self._stream.seek(self._page_start)

    def _flush(self) -> None:
        if self._page:
            self._stream.write(self._page)
            self._stream.seek(self._page_size - len(self._page), os.SEEK_CUR)
            self._page_start += self._page_size
            self._page.clear()


def open_beton(path: str | Path) -> Beton:
    """Open a .beton that `stl-offline pack` wrote.

    Raises:
        InputError: there is no such file.
        FormatError: it is no .beton, was written by something else, is cut off, damaged, or of an unknown version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no file {path}; make it with: stl-offline pack SRC {path}")
    size = path.stat().st_size
    with open(path, "rb") as stream:
        start = stream.read(_METADATA_START)
        if len(start) < HeaderType.itemsize:
            raise FormatError(f"{path} is no .beton file: it has {size} bytes")
        header = np.frombuffer(start, HeaderType, 1)[0]
        if header["version"] != CURRENT_VERSION or header["num_fields"] == 0:
            raise FormatError(f"{path} is no .beton file of version {CURRENT_VERSION}, which is all FFCV reads")
        place = _index_place(path, start)
        count, table = int(header["num_samples"]), int(header["alloc_table_ptr"])
        offset = int(place["offset"])
        whole = (
            size == table + count * ALLOC_TABLE_TYPE.itemsize
            and offset + int(place["size"]) == table
            and _METADATA_START + count * _METADATA_TYPE.itemsize <= offset
            and start == _start(header, place)
        )
        if not whole:
            raise FormatError(f"{path} is cut off or damaged ({size:,} bytes); copy it again, or pack again")
        metadata_bytes = stream.read(count * _METADATA_TYPE.itemsize)
        stream.seek(offset)
        packed = stream.read(int(place["size"]))
        allocations = np.frombuffer(stream.read(), ALLOC_TABLE_TYPE)
    if (
        xxhash.xxh3_64_intdigest(packed) != place["index_xxh3"]
        or xxhash.xxh3_64_intdigest(metadata_bytes) != place["metadata_xxh3"]
    ):
        raise FormatError(f"{path} is damaged: its index does not fit its checksum; copy it again, or pack again")
    metadata = np.frombuffer(metadata_bytes, _METADATA_TYPE)
    if zstd_size(packed) > _INDEX_BYTES + _INDEX_BYTES_PER_IMAGE * len(metadata):
        raise FormatError(f"{path} is damaged: its index claims an impossible size; copy it again, or pack again")
    images = metadata[_IMAGE]
    content_hashes = metadata[_CONTENT_HASH].astype(np.int64).view(np.uint64)
    try:
        index = json.loads(Zstd().decode(packed))
        beton = Beton(
            path=path,
            keys=index["keys"],
            class_names=tuple(index["class_names"]),
            class_ids=metadata[_CLASS_ID].astype(np.int64),
            key_hashes=metadata[_KEY_HASH].astype(np.int64).view(np.uint64),
            content_hashes=content_hashes,
            heights=images["height"].astype(np.int64),
            widths=images["width"].astype(np.int64),
            raw=images["mode"] == _MODES["raw"],
            pointers=images["data_ptr"].astype(np.int64),
            sizes=allocations["size"].astype(np.int64),
            source=index["source"],
            fingerprint=index["fingerprint"],
            stored_hashes=_stored_hashes(index.get("converted"), content_hashes),
            place=str(path),
        )
        problem = _first_problem(beton, metadata, allocations, header, offset)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        problem = f"its index cannot be read ({type(error).__name__})"
    except (RuntimeError, MemoryError) as error:  # as numcodecs has it
        problem = f"its index cannot be decompressed ({error})"
    if problem:
        raise FormatError(f"{path} is damaged: {problem}; copy it again, or pack again")
    return beton


def _stored_hashes(converted: dict[str, list[int]] | None, content_hashes: np.ndarray) -> np.ndarray | None:
    if converted is None:
        return None
    hashes = content_hashes.copy()
    hashes[np.array(converted["rows"], np.int64)] = np.array(converted["xxh3"], np.uint64)
    return hashes


def _first_problem(beton: Beton, metadata: np.ndarray, allocations: np.ndarray, header: np.void, pages_end: int) -> str:
    """What in a file contradicts itself, or "". Checksums find accidents; this finds what a wrong writer wrote."""
    count, page_size = len(metadata), int(header["page_size"])
    ends = beton.pointers + beton.sizes
    pages_start = _METADATA_START + metadata.nbytes
    texts = (*beton.keys, *beton.class_names, beton.fingerprint)
    checks = {
        "it holds no images": count > 0,
        "a key or a class name is no text": all(isinstance(text, str) and text for text in texts)
        and isinstance(beton.keys, list)
        and isinstance(beton.source, dict),
        "its max_size is no number of pixels": not isinstance(beton.source, dict)
        or beton.max_size is None
        or (type(beton.max_size) is int and beton.max_size > 0),
        f"it has {len(beton.keys):,} keys for {count:,} images": len(beton.keys) == count,
        "a key stands twice": len(set(beton.keys)) == len(beton.keys),
        "a class name stands twice": len(set(beton.class_names)) == len(beton.class_names) > 0,
        "a class id is out of range": bool(
            (beton.class_ids >= 0).all() and (beton.class_ids < len(beton.class_names)).all()
        ),
        "its page size is out of range": page_size >= MIN_PAGE_SIZE and not page_size & (page_size - 1),
        "its images and its table of places differ": bool(
            (allocations["ptr"] == metadata[_IMAGE]["data_ptr"]).all()
            and (allocations["sample_id"] == np.arange(count)).all()
        ),
        "an image lies outside of its page": page_size > 0
        and bool(
            (beton.pointers >= pages_start).all()
            and (beton.sizes > 0).all()
            and (beton.sizes <= page_size).all()
            and (ends <= pages_end).all()
            and (beton.pointers // page_size == (ends - 1) // page_size).all()
            and (ends[:-1] <= beton.pointers[1:]).all()
        ),
        "an image has no pixels": bool((beton.heights > 0).all() and (beton.widths > 0).all()),
        "an image is of an unknown kind": bool(np.isin(metadata[_IMAGE]["mode"], list(_MODES.values())).all()),
        "an image has another number of pixels": bool(
            (~beton.raw | (beton.sizes == 3 * beton.heights * beton.widths)).all()
        ),
    }
    problem = next((what for what, fine in checks.items() if not fine), "")
    if not problem:
        "".join(texts).encode()  # lone surrogates, which JSON can hold: a ValueError
    return problem


def _index_place(path: Path, start: bytes) -> np.void:
    place = np.zeros(1, _INDEX_PLACE)[0]
    if len(start) == _METADATA_START:
        descriptors = np.frombuffer(start, FieldDescType, offset=HeaderType.itemsize)
        place = np.frombuffer(descriptors[1]["arguments"].tobytes(), _INDEX_PLACE, 1)[0]
    if place["magic"] != _INDEX_MAGIC:
        raise FormatError(
            f"{path} has no keys and class names: it was not written by stl-offline; pack its images again "
            "with: stl-offline pack SRC DEST.beton"
        )
    if place["version"] != INDEX_VERSION:
        raise FormatError(
            f"{path} has an index of version {place['version']}, but this release reads version {INDEX_VERSION}; "
            "pack the images again"
        )
    return place


def _start(header: np.void, place: np.void) -> bytes:
    """The header and descriptors that a file with these numbers begins with: every other byte of them is fixed."""
    numbers = (int(header[name]) for name in ("num_samples", "page_size", "alloc_table_ptr"))
    return _header(*numbers) + _field_descriptors(place)


def _header(count: int, page_size: int, table: int) -> bytes:
    header = np.zeros(1, HeaderType)
    header["version"] = CURRENT_VERSION
    header["num_fields"] = len(_FIELDS)
    header["page_size"] = page_size
    header["num_samples"] = count
    header["alloc_table_ptr"] = table
    return header.tobytes()


def _field_descriptors(place: np.ndarray | np.void) -> bytes:
    descriptors = np.zeros(len(_FIELDS), FieldDescType)
    type_ids = {handler: type_id for type_id, handler in TYPE_ID_HANDLER.items()}
    for descriptor, (name, field) in zip(descriptors, _FIELDS.items(), strict=True):
        descriptor["type_id"] = type_ids[type(field)]
        descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
    descriptors[1]["arguments"][: place.nbytes] = np.frombuffer(place.tobytes(), np.uint8)
    return descriptors.tobytes()


def _doubled(rows: np.ndarray) -> np.ndarray:
    """The rows, and as many zeros. As bytes: copies of structured arrays leave the padding between fields undefined."""
    more = np.zeros(2 * len(rows), rows.dtype)
    more.view(np.uint8)[: rows.nbytes] = rows.view(np.uint8)
    return more


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
