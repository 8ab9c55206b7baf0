"""The token cache: labels as memory-mapped arrays in the order of the images, for training.

It is filled once from whole shards, for one label set and one list of images, and named by a hash of both. Processes
share it. It is written under a temporary name and renamed, so that no partial cache is ever opened. Opening compares
each file with a checksum; a damaged cache is built again. It holds all views of a set, or some consecutive ones:
`stl_offline.labels.views_ahead` makes those as training comes to them.

n: images; V: views of each; Gh, Gw: the token grid; k: classes kept for each cell.
"""

import concurrent.futures
import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import mmap
import os
import secrets
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.lib.format import open_memmap

from stl_offline.errors import FormatError, TargetError
from stl_offline.files import atomic_write, cache_dir, canonical_json, make_folder
from stl_offline.labels.cache_file import (
    INFO,
    MOST_THREADS,
    VERSION,
    TokenCache,
    array_layout,
    cache_bytes,
    npy_header,
    open_cache,
    own_checksum,
)
from stl_offline.labels.cache_rows import ViewsOf, place_shard
from stl_offline.labels.join import JoinReport, check_class_names, join
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.spec import LabelSpec
from stl_offline.progress import progress_bar
from stl_offline.settings import check_match

_log = logging.getLogger(__name__)

_NAMED_AT_ONCE = 1 << 16
_PART_BYTES = 1 << 22
_MADV_POPULATE_WRITE = 23  # of Linux; Python names it only from 3.14 on


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
    policy = {"match": match, "missing": missing, "allow_changed": allow_changed}
    maker = CacheMaker(label_set.parts, keys, content_hashes, class_names, folder=folder, **policy)
    return maker.make(maker.views)


class CacheMaker:
    """Makes token caches of a label set for some images: of all of its views, or of consecutive ones.

    Args:
        label_sets: one, or several of the same images and random family whose views follow each other.
        keys, content_hashes, class_names, folder: as of `build_token_cache`; policy: match, missing, allow_changed.

    spec: of all views; views: their places, 0 … V; images: n.
    """

    def __init__(
        self,
        label_sets: Sequence[LabelSet],
        keys: Sequence[str],
        content_hashes: np.ndarray,
        class_names: Sequence[str],
        *,
        folder: str | Path | None = None,
        **policy: Any,
    ) -> None:
        check_match(policy["match"], allow_changed=policy["allow_changed"])
        check_class_names(label_sets[0].spec.class_names, tuple(class_names))
        self.folder = make_folder(cache_dir() / "tokens" if folder is None else folder)
        self._name = cache_name(label_sets, keys, content_hashes, **policy)
        self._images = (keys, content_hashes, class_names)
        self.images = len(keys)
        self._policy = policy
        bounds = np.cumsum([0, *(each.spec.views_per_image for each in label_sets)]).tolist()
        self.parts = [(each, range(*ends)) for each, ends in zip(label_sets, itertools.pairwise(bounds), strict=True)]
        self.views = range(bounds[-1])
        self.spec = replace(label_sets[0].spec, views_per_image=bounds[-1])
        self._reports: dict[int, JoinReport] = {}

    def path(self, views: range) -> Path:
        """Where the cache of some views lies."""
        return self.folder / (self._name if views == self.views else f"{self._name}-{views.start}-{views.stop - 1}")

    def join(self, number: int) -> JoinReport:
        """Where the images' labels are in one of the label sets."""
        if number not in self._reports:
            self._reports[number] = join(self.parts[number][0], *self._images, **self._policy)
        return self._reports[number]

    def make(self, views: range, *, keep: Sequence[range] = (), stop: threading.Event | None = None) -> TokenCache:
        """The cache of some views; built where it is not there yet, or is damaged.

        Args:
            keep: where it is built, the caches of other views than these are removed first.
            stop: for work in the background. It shows no progress, takes one thread, and ends with `Stopped` once this
                is set.
        """
        path = self.path(views)
        # Whatever is wrong is reported below, if it still is once no other process can be building it.
        with contextlib.suppress(FileNotFoundError, FormatError):
            return open_cache(path)
        with _only_process(self.folder / f"{self._name}.lock"):
            try:
                return open_cache(path)
            except FileNotFoundError:
                pass
            except FormatError as error:
                _log.warning("%s: it is built again", error)
            sources = self._sources(views)
            self._remove(views, keep)
            return self._build(path, views, sources, stop)

    def _sources(self, views: range) -> list["_Source"]:
        found = {}
        for number, (label_set, own) in enumerate(self.parts):
            first, last = max(own.start, views.start), min(own.stop, views.stop)
            if first < last:
                of = ViewsOf(first - own.start, last - own.start, first - views.start)
                found[number] = _Source(label_set, self.join(number), of)
        # No more of them in memory than are read.
        self._reports = {number: source.report for number, source in found.items()}
        return list(found.values())

    def _build(self, path: Path, views: range, sources: list["_Source"], stop: threading.Event | None) -> TokenCache:
        spec = self.spec.of_views(views)
        temporary = self.folder / f".{path.name}.{secrets.token_hex(4)}.tmp"
        try:
            temporary.mkdir()
            _fill(temporary, spec, sources, stop)
            os.replace(temporary, path)
        except OSError as error:
            if isinstance(error, TargetError):
                raise
            needed = cache_bytes(spec, self.images)
            raise TargetError(
                f"cannot write the token cache {path}: {error.strerror or error}; it needs {needed / 1e9:.2f} GB "
                "(STL_OFFLINE_CACHE chooses another place)"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return open_cache(path)

    def _remove(self, views: range, keep: Sequence[range]) -> None:
        """Remove what killed builds left, a damaged cache of these views, and caches of views that are not kept.

        Only the lock's holder may call it. Processes that have opened a cache keep it: their memory maps hold its
        files until they are closed.
        """
        kept = {self.path(each) for each in keep} - {self.path(views)}
        others = {*self.folder.glob(f"{self._name}-*"), self.path(views)} - kept
        for left in (*others, *self.folder.glob(f".{self._name}*.tmp")):
            shutil.rmtree(left, ignore_errors=True)


def cache_name(
    label_sets: Sequence[LabelSet],
    keys: Sequence[str],
    content_hashes: np.ndarray,
    *,
    match: str,
    missing: str,
    allow_changed: bool,
) -> str:
    """The cache's name: a hash of the label sets, the images in their order, and how they are joined."""
    made_of = [*(each.fingerprint for each in label_sets), match, missing, bool(allow_changed), len(keys)]
    named = hashlib.sha256(json.dumps(made_of).encode())
    # As JSON, so that no two lists of keys run together to the same text; a part at a time, for millions of them.
    for first in range(0, len(keys), _NAMED_AT_ONCE):
        named.update(json.dumps(list(keys[first : first + _NAMED_AT_ONCE])).encode())
    named.update(np.asarray(content_hashes, dtype="<u8").tobytes())
    return named.hexdigest()[:32]


class _Source(NamedTuple):
    """A label set, where the images' labels are in it, and which of its views are wanted."""

    label_set: LabelSet
    report: JoinReport
    views: ViewsOf


class Stopped(Exception):
    """Work in the background has ended because nobody waits for it any more."""


def _fill(folder: Path, spec: LabelSpec, sources: list[_Source], stop: threading.Event | None) -> None:
    n = len(sources[0].report.shard)
    arrays = _make_arrays(folder, spec, n)
    for source in sources:
        _place_shards(arrays, source, stop)
    # On disk before it gets its name: after a power cut it would read as zeros.
    _sync_files([folder / f"{name}.npy" for name in arrays])
    checksums = {}
    for name, array in arrays.items():
        # What the file holds, without reading it again.
        digest = xxhash.xxh3_64(npy_header(array.dtype, array.shape))
        content = memoryview(np.asarray(array).reshape(-1).view(np.uint8))
        for start in range(0, len(content), _PART_BYTES):
            digest.update(content[start : start + _PART_BYTES])
        checksums[name] = digest.hexdigest()
    info = {
        "version": VERSION,
        "images": n,
        "spec": spec.to_json(),
        "report": str(sources[0].report),
        "xxh3": checksums,
    }
    atomic_write(folder / INFO, canonical_json(info | {"own_xxh3": own_checksum(info)}))


def _make_arrays(folder: Path, spec: LabelSpec, n: int) -> dict[str, np.memmap]:
    arrays = {}
    for name, (dtype, shape) in array_layout(spec, n).items():
        file = folder / f"{name}.npy"
        arrays[name] = open_memmap(file, mode="w+", dtype=dtype, shape=shape)
        # A memory map on a full disk kills the process when it is written to; so the space is taken first.
        with open(file, "r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.fstat(stream.fileno()).st_size)
        _map_pages(arrays[name])
    return arrays


def _place_shards(arrays: dict[str, np.memmap], source: _Source, stop: threading.Event | None) -> None:
    label_set, report, views = source
    order = np.argsort(report.shard, kind="stable")
    bounds = np.searchsorted(report.shard[order], np.arange(len(label_set.shards) + 1))
    needed = [index for index in range(len(label_set.shards)) if bounds[index] < bounds[index + 1]]

    def fill_from(index: int) -> int:
        if stop is not None and stop.is_set():
            raise Stopped
        samples = order[bounds[index] : bounds[index + 1]]
        place_shard(arrays, label_set, index, samples, report.row[samples], views)
        return len(samples)

    if stop is not None:
        for index in needed:
            fill_from(index)
        return
    # Shards land in different rows, so threads do not meet; no more shards are in memory than threads.
    with (
        progress_bar(report.matched, "labels → token cache") as progress,
        concurrent.futures.ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as pool,
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
            # A part at a time, because other threads wait for each.
            for start in range(0, len(array._mmap), _PART_BYTES):
                array._mmap.madvise(_MADV_POPULATE_WRITE, start, min(_PART_BYTES, len(array._mmap) - start))


def _sync_files(files: Sequence[Path]) -> None:
    """Flush all files to the disk, in parallel."""
    with concurrent.futures.ThreadPoolExecutor(len(files)) as pool:
        list(pool.map(_sync, files))


def _sync(file: Path) -> None:
    with open(file, "r+b") as stream:
        os.fdatasync(stream.fileno())


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Wait for a lock that the kernel frees when its holder dies. Its empty file stays: removing it is a race."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise TargetError(f"cannot write into {path.parent}: {error.strerror}; set STL_OFFLINE_CACHE") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise TargetError(f"cannot lock {path}: {error.strerror}; set STL_OFFLINE_CACHE") from error
        yield
    finally:
        os.close(file)
