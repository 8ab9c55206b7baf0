"""The files of a token cache, and opening them: labels as memory-mapped arrays in the order of the images.

A folder holds a .npy file for each array and ``cache.json``, with a checksum for each file and one for itself. Opening
compares them all. `stl_offline.labels.cache` makes such folders.

n: images; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

import concurrent.futures
import io
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import xxhash
from numpy.lib.format import dtype_to_descr, write_array_header_1_0

from stl_offline.compiled import read_only
from stl_offline.errors import FormatError
from stl_offline.files import COPY_BYTES, canonical_json
from stl_offline.labels.draws import bits_of, expand_into, packed_bytes
from stl_offline.labels.spec import LabelSpec, is_count
from stl_offline.labels.store import FolderStorage, read_object

VERSION = 3  # to be raised where what fills a cache is mended, too: wrong ones are made again
INFO = "cache.json"
_INFO_BYTES = 1 << 26
MOST_THREADS = 8


@dataclass(frozen=True, eq=False)
class TokenCache:
    """Memory-mapped labels of n images, in their order.

    class_ids: (n, V, Gh, Gw, k) uint16 or uint32; probabilities: (n, V, Gh, Gw, k) float32; confidence:
    (n, V, Gh, Gw) float32; views: (n, V, 6) float32; labelled: (n,) uint8, 0 where an image has no label (its other
    entries are zeros).

    None where the labels have no such thing: confidence; draws: (n, V, bytes) uint8, each map's drawn classes, packed
    (`stl_offline.labels.draws`); head_ids: (n, V, c + s), the class head's best classes and its drawn ones;
    head_masses: (n, V, c + s) float32, their probabilities, each draw's an s-th of what the best ones leave.
    """

    path: Path
    spec: LabelSpec
    class_ids: np.ndarray
    probabilities: np.ndarray
    confidence: np.ndarray | None
    views: np.ndarray
    labelled: np.ndarray
    report: str
    draws: np.ndarray | None = None
    head_ids: np.ndarray | None = None
    head_masses: np.ndarray | None = None

    @classmethod
    def of_no_views(cls, spec: LabelSpec, labelled: np.ndarray) -> Self:
        """What is known of labels before any map is read: the arrays have no views yet."""
        shapes = array_layout(spec, len(labelled)) | {"class_ids": (spec.id_dtype, (0, 0, *spec.map_shape[1:]))}
        shapes.setdefault("probabilities", (np.dtype("<f4"), (0, 0, *spec.map_shape[1:])))
        arrays = {name: np.empty((len(labelled), 0, *shape[2:]), dtype) for name, (dtype, shape) in shapes.items()}
        arrays["labelled"] = np.asarray(labelled, dtype=np.uint8)
        return cls(path=Path(), spec=spec, report="", **{"confidence": None, **arrays})

    def entries(self, sample: int, view: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """All that is stored of a map's distributions: class ids and float32 masses, (Gh, Gw, k + S).

        Draws share the mass outside the top k; a class may be drawn several times.
        """
        ids, masses = self.class_ids[sample, view], self.probabilities[sample, view]
        if self.draws is None:
            return ids, masses
        found = np.empty((*self.grid, self.top_k + self.spec.draws), ids.dtype)
        sums = np.empty(found.shape, np.float32)
        arrays = (read_only(ids), read_only(masses), read_only(self.draws[sample, view]))
        expand_into(*arrays, bits_of(self.num_classes), False, found, sums)
        return found, sums

    def __len__(self) -> int:
        return len(self.labelled)

    def __reduce__(self) -> tuple:
        return open_token_cache, (self.path,)  # worker processes map the files again, and copy nothing

    @property
    def num_classes(self) -> int:
        """K."""
        return self.spec.num_classes

    @property
    def grid(self) -> tuple[int, int]:
        """(Gh, Gw)."""
        return self.spec.grid

    @property
    def top_k(self) -> int:
        """k."""
        return self.spec.top_k


def open_token_cache(path: str | Path) -> TokenCache:
    """Open a cache that was built, after comparing every byte of it with its checksums.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is of another version, cut off or damaged.
    """
    try:
        return open_cache(Path(path))
    except FormatError as error:
        raise FormatError(f"{error}; remove {path}") from error


def open_cache(path: Path) -> TokenCache:
    """`open_token_cache` for those who build a damaged one again."""
    if not path.is_dir():
        raise FileNotFoundError(f"there is no token cache {path}")
    storage = FolderStorage(path)
    try:
        info = read_object(storage, INFO, _INFO_BYTES)
    except FileNotFoundError as error:
        raise FormatError(f"the token cache {path} lacks its {INFO}") from error
    if info.get("version") != VERSION:
        raise FormatError(f"the token cache {path} is of version {str(info.get('version'))[:20]}, not {VERSION}")
    own = info.pop("own_xxh3", "")
    if not own or own != own_checksum(info):
        raise FormatError(f"{path / INFO} is damaged (its checksum differs)")
    try:
        spec = LabelSpec.from_json(info["spec"])
        images, report, checksums = info["images"], info["report"], info["xxh3"]
        if not (is_count(images) and isinstance(report, str) and isinstance(checksums, dict)):
            raise FormatError("an entry is of a wrong type")
    except (KeyError, FormatError) as error:
        raise FormatError(f"{path / INFO} cannot be used: {error}") from error
    layout = array_layout(spec, images)
    for name, (dtype, shape) in layout.items():
        file = storage.path(f"{name}.npy")
        size = len(npy_header(dtype, shape)) + dtype.itemsize * math.prod(shape)
        if not file.is_file() or file.stat().st_size != size:
            raise FormatError(f"the token cache's file {file} is missing or cut off: it must have {size:,} bytes")
    found = _checksums(path, layout)
    damaged = next((name for name in layout if found[name] != checksums.get(name)), None)
    if damaged is not None:
        raise FormatError(f"the token cache's file {path / damaged}.npy is damaged (its checksum differs)")
    # The checksums cover the files' own headers, which so need not be parsed.
    arrays = {
        name: np.memmap(path / f"{name}.npy", dtype, "r", len(npy_header(dtype, shape)), shape)
        for name, (dtype, shape) in layout.items()
    }
    # Of labels without top-k classes.
    empty = (images, *spec.map_shape)
    arrays.setdefault("class_ids", np.empty(empty, spec.id_dtype))
    arrays.setdefault("probabilities", np.empty(empty, np.float32))
    return TokenCache(path=path, spec=spec, report=report, **{"confidence": None, **arrays})


def array_layout(spec: LabelSpec, n: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Dtype and shape of each file's array, for n images."""
    views, cells = spec.views_per_image, math.prod(spec.grid)
    head = (n, views, spec.class_top_k + spec.class_draws)
    arrays = {
        "class_ids": (spec.id_dtype, (n, *spec.map_shape)),
        "probabilities": (np.dtype("<f4"), (n, *spec.map_shape)),
        "confidence": (np.dtype("<f4"), (n, *spec.map_shape[:-1]) if spec.has_confidence else (0,)),
        "draws": (np.dtype("u1"), (n, views, packed_bytes(cells * spec.draws, spec.num_classes) if spec.draws else 0)),
        "head_ids": (spec.id_dtype, head),
        "head_masses": (np.dtype("<f4"), head),
        "views": (np.dtype("<f4"), (n, views, 6)),
        "labelled": (np.dtype("u1"), (n,)),
    }
    # What has no number in it is in no file.
    return {name: (dtype, shape) for name, (dtype, shape) in arrays.items() if math.prod(shape)}


def npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file of such an array begins with."""
    stream = io.BytesIO()
    described = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(stream, described)
    return stream.getvalue()


def cache_bytes(spec: LabelSpec, n: int) -> int:
    """Bytes of the arrays of a cache of n images."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in array_layout(spec, n).values())


def own_checksum(info: dict[str, Any]) -> str:
    """xxh3 (64 bit, hexadecimal) of the entries of `cache.json` but for this one itself; "" where no text can hold
    them: half of a surrogate pair, an infinite number, too many levels."""
    try:
        return xxhash.xxh3_64_hexdigest(canonical_json(info))
    except (ValueError, RecursionError):
        return ""


def _checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """xxh3 (64 bit, hexadecimal) of the file of each array, all read at the same time.

    All of a cache is compared before any of it is used, because training draws from all of it from the first batch on.
    That costs one pass over files which the first epoch reads anyway, so they are in memory for it where they fit.
    """
    files = [folder / f"{name}.npy" for name in names]
    with concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool:
        # The largest first, so that none is left to the end alone.
        order = sorted(files, key=lambda file: -file.stat().st_size)
        return dict(zip((file.stem for file in order), pool.map(_checksum, order), strict=True))


def _checksum(file: Path) -> str:
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(COPY_BYTES))
    try:
        with open(file, "rb", buffering=0) as stream:
            while size := stream.readinto(buffer):
                digest.update(buffer[:size])
    except OSError as error:
        raise FormatError(f"the token cache's file {file} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()
