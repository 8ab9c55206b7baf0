"""The token cache: labels as memory-mapped arrays in the order of the images, for training.

It is filled once from whole shards, for one label set and one list of images, and named by a hash of both. Processes
share it. It is written under a temporary name and renamed, so that no partial cache is ever opened. Opening compares
each file with a checksum; a damaged cache is built again.

n: images; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import io
import json
import logging
import math
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.lib.format import dtype_to_descr, open_memmap, write_array_header_1_0

from stl_offline.compiled import read_only
from stl_offline.errors import FormatError, TargetError
from stl_offline.files import COPY_BYTES, atomic_write, cache_dir, canonical_json, make_folder
from stl_offline.labels.cache_rows import place_shard
from stl_offline.labels.draws import bits_of, expand_into, packed_bytes
from stl_offline.labels.join import JoinReport, check_class_names, join
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.spec import LabelSpec, is_count
from stl_offline.labels.store import FolderStorage, read_object
from stl_offline.progress import progress_bar
from stl_offline.settings import check_match

_log = logging.getLogger(__name__)

_VERSION = 2
_INFO = "cache.json"
_INFO_BYTES = 1 << 26
_MOST_THREADS = 8
_NAMED_AT_ONCE = 1 << 16
_MADV_POPULATE_WRITE = 23  # of Linux; Python names it only from 3.14 on


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


def build_token_cache(
    label_set: LabelSet,
    keys: Sequence[str],
    content_hashes: np.ndarray,
    class_names: Sequence[str],
    *,
    folder: str | Path | None = None,
    match: str = "key",
    missing: str = "error",
    allow_changed: bool = False,
) -> TokenCache:
    """The token cache of a label set for some images; built where it is not there yet, and built again, with a
    warning, where it is damaged or of another release.

    Args: as `stl_offline.labels.join.join`; ``folder``: where caches lie (default: `stl_offline.files.cache_dir`).

    Raises:
        JoinError, InputError: labels and images do not belong together.
        FormatError: the label set is damaged.
        TargetError: the cache cannot be written (with a full disk, the message states the space that it needs).
    """
    check_match(match, allow_changed=allow_changed)
    check_class_names(label_set.spec.class_names, tuple(class_names))
    folder = make_folder(cache_dir() / "tokens" if folder is None else folder)
    policy = {"match": match, "missing": missing, "allow_changed": allow_changed}
    name = cache_name(label_set, keys, content_hashes, **policy)
    path = folder / name
    # Whatever is wrong is reported below, if it still is once no other process can be building it.
    with contextlib.suppress(FileNotFoundError, FormatError):
        return _open(path)
    with _only_process(folder / f"{name}.lock"):
        try:
            return _open(path)
        except FileNotFoundError:
            pass
        except FormatError as error:
            _log.warning("%s: it is built again", error)
        report = join(label_set, keys, content_hashes, class_names, **policy)
        _remove(path, folder, name)
        temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir()
            _fill(temporary, label_set, report)
            os.replace(temporary, path)
        except OSError as error:
            if isinstance(error, TargetError):
                raise
            needed = sum(_bytes(dtype, shape) for dtype, shape in _layout(label_set.spec, len(keys)).values())
            raise TargetError(
                f"cannot write the token cache {path}: {error.strerror or error}; it needs {needed / 1e9:.2f} GB "
                "(STL_OFFLINE_CACHE chooses another place)"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _open(path)


def open_token_cache(path: str | Path) -> TokenCache:
    """Open a cache that was built, after comparing every byte of it with its checksums.

    Raises:
        FileNotFoundError: there is none.
        FormatError: it is of another version, cut off or damaged.
    """
    try:
        return _open(Path(path))
    except FormatError as error:
        raise FormatError(f"{error}; remove {path}") from error


def _open(path: Path) -> TokenCache:
    if not path.is_dir():
        raise FileNotFoundError(f"there is no token cache {path}")
    storage = FolderStorage(path)
    try:
        info = read_object(storage, _INFO, _INFO_BYTES)
    except FileNotFoundError as error:
        raise FormatError(f"the token cache {path} lacks its {_INFO}") from error
    if info.get("version") != _VERSION:
        raise FormatError(f"the token cache {path} is of version {str(info.get('version'))[:20]}, not {_VERSION}")
    own = info.pop("own_xxh3", "")
    if not own or own != _own_checksum(info):
        raise FormatError(f"{path / _INFO} is damaged (its checksum differs)")
    try:
        spec = LabelSpec.from_json(info["spec"])
        images, report, checksums = info["images"], info["report"], info["xxh3"]
        if not (is_count(images) and isinstance(report, str) and isinstance(checksums, dict)):
            raise FormatError("an entry is of a wrong type")
    except (KeyError, FormatError) as error:
        raise FormatError(f"{path / _INFO} cannot be used: {error}") from error
    layout = _layout(spec, images)
    for name, (dtype, shape) in layout.items():
        file = storage.path(f"{name}.npy")
        size = len(_header(dtype, shape)) + _bytes(dtype, shape)
        if not file.is_file() or file.stat().st_size != size:
            raise FormatError(f"the token cache's file {file} is missing or cut off: it must have {size:,} bytes")
    found = _checksums(path, layout)
    damaged = next((name for name in layout if found[name] != checksums.get(name)), None)
    if damaged is not None:
        raise FormatError(f"the token cache's file {path / damaged}.npy is damaged (its checksum differs)")
    # The checksums cover the files' own headers, which so need not be parsed.
    arrays = {
        name: np.memmap(path / f"{name}.npy", dtype, "r", len(_header(dtype, shape)), shape)
        for name, (dtype, shape) in layout.items()
    }
    # Of labels without top-k classes.
    empty = (images, *spec.map_shape)
    arrays.setdefault("class_ids", np.empty(empty, spec.id_dtype))
    arrays.setdefault("probabilities", np.empty(empty, np.float32))
    return TokenCache(path=path, spec=spec, report=report, **{"confidence": None, **arrays})


def cache_name(
    label_set: LabelSet,
    keys: Sequence[str],
    content_hashes: np.ndarray,
    *,
    match: str,
    missing: str,
    allow_changed: bool,
) -> str:
    """The cache's name: a hash of the label set, the images in their order, and how they are joined."""
    made_of = [label_set.fingerprint, match, missing, bool(allow_changed), len(keys)]
    named = hashlib.sha256(json.dumps(made_of).encode())
    # As JSON, so that no two lists of keys run together to the same text; a part at a time, for millions of them.
    for first in range(0, len(keys), _NAMED_AT_ONCE):
        named.update(json.dumps(list(keys[first : first + _NAMED_AT_ONCE])).encode())
    named.update(np.asarray(content_hashes, dtype="<u8").tobytes())
    return named.hexdigest()[:32]


def _layout(spec: LabelSpec, n: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
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


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What a .npy file of such an array begins with."""
    stream = io.BytesIO()
    described = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    write_array_header_1_0(stream, described)
    return stream.getvalue()


def _bytes(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    return dtype.itemsize * int(np.prod(shape))


def _fill(folder: Path, label_set: LabelSet, report: JoinReport) -> None:
    n = len(report.shard)
    arrays = _make_arrays(folder, label_set.spec, n)
    _place_shards(arrays, label_set, report)
    # On disk before it gets its name: after a power cut it would read as zeros.
    _sync_files([folder / f"{name}.npy" for name in arrays])
    checksums = {}
    for name, array in arrays.items():
        # What the file holds, without reading it again.
        digest = xxhash.xxh3_64(_header(array.dtype, array.shape))
        digest.update(np.asarray(array).data)
        checksums[name] = digest.hexdigest()
    info = {
        "version": _VERSION,
        "images": n,
        "spec": label_set.spec.to_json(),
        "report": str(report),
        "xxh3": checksums,
    }
    atomic_write(folder / _INFO, canonical_json(info | {"own_xxh3": _own_checksum(info)}))


def _make_arrays(folder: Path, spec: LabelSpec, n: int) -> dict[str, np.memmap]:
    arrays = {}
    for name, (dtype, shape) in _layout(spec, n).items():
        file = folder / f"{name}.npy"
        arrays[name] = open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        # A memory map on a full disk kills the process when it is written to; so the space is taken first.
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
        _map_pages(arrays[name])
    return arrays


def _place_shards(arrays: dict[str, np.memmap], label_set: LabelSet, report: JoinReport) -> None:
    order = np.argsort(report.shard, kind="stable")
    bounds = np.searchsorted(report.shard[order], np.arange(len(label_set.shards) + 1))
    needed = [index for index in range(len(label_set.shards)) if bounds[index] < bounds[index + 1]]

    def fill_from(index: int) -> int:
        samples = order[bounds[index] : bounds[index + 1]]
        place_shard(arrays, label_set, index, samples, report.row[samples])
        return len(samples)

    # Shards land in different rows, so threads do not meet; no more shards are in memory than threads.
    with (
        progress_bar(report.matched, "labels → token cache") as progress,
        concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool,
    ):
        try:
            for filled in pool.map(fill_from, needed):
                progress.update(filled)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _map_pages(array: np.memmap) -> None:
    """Map a new file's pages at once, in their order.

    Images in another order than the labels touch them one by one, which costs more than the labels themselves (1.5
    times the images per second). Not where the pages would drive others out of memory; then, and on kernels before
    5.14, they come as they are touched.
    """
    physical = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    if 0 < array.nbytes <= physical // 8:
        with contextlib.suppress(OSError):
            array._mmap.madvise(_MADV_POPULATE_WRITE)


def _own_checksum(info: dict[str, Any]) -> str:
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
    with concurrent.futures.ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
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


def _sync_files(files: Sequence[Path]) -> None:
    """Flush all files to the disk, in parallel."""
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(_sync, files))


def _sync(file: Path) -> None:
    with open(file, "r+b") as stream:
        os.fdatasync(stream.fileno())


def _remove(path: Path, folder: Path, name: str) -> None:
    """Remove what a killed build of this cache left, or a damaged cache. Only the lock's holder may call it."""
    for left in (path, *folder.glob(f".{name}.*.tmp")):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Wait for a lock that the kernel frees when its holder dies. Its empty file stays: removing it is a race."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TargetError(f"cannot write into {path.parent}: {error.strerror}; set STL_OFFLINE_CACHE") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
