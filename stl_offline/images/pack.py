"""Packing: images of any source into one .beton, checked, in the source's order.

Images are read, checked and converted by threads (PIL and turbojpeg leave the interpreter lock; a thread, unlike a
process, cannot die unseen); their results are taken in order with a bounded number on the way, so the bytes do not
depend on how many threads there are.
"""

import contextlib
import fcntl
import glob
import logging
import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from stl_offline.errors import FormatError, InputError, TargetError, counted
from stl_offline.files import atomic_path, cache_dir, canonical_json, make_folder, remove_leftovers
from stl_offline.images.beton import INDEX_VERSION, PAGE_SIZE, Beton, BetonWriter, open_beton
from stl_offline.images.classes import UNLABELLED
from stl_offline.images.common import PassedOver, Source, SourceImage
from stl_offline.images.encode import EncodedImage, encode_image
from stl_offline.images.sources import open_any, open_source, resolve, source_state
from stl_offline.images.tar_stream import TarStreams
from stl_offline.pixels import ImageError
from stl_offline.progress import progress_bar
from stl_offline.remote import shown

_log = logging.getLogger(__name__)

# Images that a thread takes at once: enough that small ones do not spend their time in queues.
_CHUNK = 16
# Bytes of source files that are in memory: of a chunk, and of all.
_CHUNK_BYTES, _MOST_HELD = 16 << 20, 256 << 20


@dataclass(frozen=True)
class PackReport:
    """What packing did.

    samples, stored_as_is, converted: images; classes: of the class list; bytes: the file's size; skipped: (key, reason)
    of each broken image that was left out; passed_over: files that are no images.
    """

    path: Path
    samples: int
    classes: int
    stored_as_is: int
    converted: int
    skipped: tuple[tuple[str, str], ...]
    bytes: int
    passed_over: PassedOver = field(default_factory=PassedOver)


@dataclass(frozen=True)
class EncodeResult:
    """An image as it is stored, or the error with which it is broken."""

    key: str
    class_id: int
    image: EncodedImage | None
    error: ImageError | None = None


def pack(
    source_spec: str | Path,
    destination: str | Path,
    *,
    max_size: int | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    class_names: Sequence[str] | None = None,
    class_map: Mapping[str, str] | None = None,
    page_size: int = PAGE_SIZE,
) -> PackReport:
    """Write the images of a source into a .beton, which appears whole or not at all.

    Temporary files that killed processes left at ``destination`` are removed.

    Args:
        source_spec: what `open_source` takes.
        destination: a name that ends in ".beton"; a file of that name is replaced.
        max_size: pixels; images whose longer side is longer are made smaller.
        skip_broken: leave out (and report) images that cannot be decoded, instead of stopping.
        workers: threads; None: one per processor.
        class_names: the class list to use, else the source's own.
        class_map: new names of the source's classes (`stl_offline.images.classes.read_class_map`).
        page_size: bytes; see `BetonWriter`.

    Raises:
        InputError: the source cannot be used, or an image is broken (the error names the first), or too big.
        TargetError: the file cannot be written.
    """
    destination = Path(destination)
    if destination.suffix != ".beton":
        raise InputError(f"packed images need a name that ends in .beton, got {destination}")
    if destination.is_dir():
        raise TargetError(f"{destination} is a folder; choose another name")
    if max_size is not None and max_size < 1:
        raise InputError(f"the largest size must be at least 1 pixel, got {max_size}")
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise InputError(f"packing needs at least one worker, got {workers}")
    source = open_any(source_spec, class_names, class_map)
    streamed = source if isinstance(source, TarStreams) else None
    count = len(source) if streamed is None else None
    named = shown(os.fspath(source_spec))
    if streamed is None:
        tell_of_source(source, named)
    remove_leftovers(destination.parent, glob.escape(destination.name))

    as_is = 0
    skipped: list[tuple[str, str]] = []
    with (
        atomic_path(destination) as temporary,
        open(temporary, "w+b") as stream,
        progress_bar(count, "packing") as bar,
    ):
        writer = BetonWriter(stream, count, page_size)
        keys: set[str] = set()
        for result in encode_all(source, max_size, workers):
            bar.update()
            if result.key in keys:
                raise InputError(f"{named} gives the key {result.key!r} twice; every image needs its own")
            keys.add(result.key)
            if result.image is not None:
                writer.add(result.key, result.class_id, result.image)
                as_is += result.image.as_is
            elif skip_broken:
                skipped.append((result.key, str(result.error)))
            else:
                raise broken_image(result.key, named, result.error)
        if not len(writer):
            raise InputError(f"{named} has no image that can be used; {len(skipped):,} are broken")
        found, classes = (source.class_names, None) if streamed is None else streamed.finish()
        if streamed is not None:
            tell_of_source(source, named, found)
        writer.finish(found, {"kind": source.kind, "max_size": max_size}, classes)
        samples = len(writer)
    return PackReport(
        path=destination,
        samples=samples,
        classes=len(found),
        stored_as_is=as_is,
        converted=samples - as_is,
        skipped=tuple(skipped),
        bytes=destination.stat().st_size,
        passed_over=source.passed_over,
    )


def ensure_beton(
    spec: str | Path,
    *,
    max_size: int | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    class_names: Sequence[str] | None = None,
    class_map: Mapping[str, str] | None = None,
) -> Beton:
    """Open a .beton; pack anything else once, into the cache, and open that. Logs what was done, and where.

    The packed file's name comes from what is packed (`stl_offline.images.sources.source_state`) and how, so other or
    changed images are packed again. Of several processes that want the same images, one packs and the others wait.
    Arguments are those of `pack`.

    Raises:
        InputError, FormatError, TargetError: as `pack` and `open_beton`; or a .beton has another class list than
            ``class_names``.
    """
    if os.fspath(spec).endswith(".beton"):
        beton = open_beton(spec)
        if class_names is not None and tuple(class_names) != beton.class_names:
            raise InputError(
                f"{spec} has another class list ({_some(beton.class_names)}) than the one asked for "
                f"({_some(tuple(class_names))}); pack its images with that list"
            )
        return beton
    path = _packed_path(spec, max_size, skip_broken, class_names, class_map)
    make_folder(path.parent)
    with locked(path.with_suffix(".lock")):
        if path.exists():
            try:
                beton = open_beton(path)
            except FormatError as error:
                _log.warning("packing again: %s", error)
            else:
                _log.info("using packed images %s", path)
                return replace(beton, place=shown(os.fspath(spec)))
        remove_leftovers(path.parent)
        report = pack(
            spec,
            path,
            max_size=max_size,
            skip_broken=skip_broken,
            workers=workers,
            class_names=class_names,
            class_map=class_map,
        )
    _log.info("packed %s images of %s classes → %s", f"{report.samples:,}", f"{report.classes:,}", path)
    for key, reason in report.skipped:
        _log.warning("left out %s: %s", key, reason)
    return replace(open_beton(path), place=shown(os.fspath(spec)))


def find_packed(
    spec: str | Path, *, skip_broken: bool = False, class_map: Mapping[str, str] | None = None
) -> Beton | None:
    """What `ensure_beton` would open without packing anything, or None. Raises as it does."""
    if os.fspath(spec).endswith(".beton"):
        return open_beton(spec)
    path = _packed_path(spec, None, skip_broken, None, class_map)
    with contextlib.suppress(FormatError):
        return replace(open_beton(path), place=shown(os.fspath(spec))) if path.exists() else None
    return None


def check_place_of_images(spec: str | Path) -> None:
    """Raise InputError, or FormatError for packed images, where nothing is there; no image is looked at."""
    if os.fspath(spec).endswith(".beton"):
        open_beton(spec)
    else:
        resolve(spec)


def pack_sample(
    spec: str | Path,
    count: int,
    folder: str | Path,
    *,
    skip_broken: bool = False,
    class_map: Mapping[str, str] | None = None,
) -> tuple[Beton, int]:
    """Pack at most ``count`` images, spread evenly over the source, into ``folder``, to measure on them.

    Returns: the packed images, and how many the source has.

    Raises:
        InputError: as `stl_offline.images.sources.open_source`; or one of these images is broken.
    """
    source = open_source(spec, class_map=class_map)
    wanted = set(np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64).tolist())
    path = Path(folder) / "sample.beton"
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, len(wanted))
        for position, image in enumerate(source):
            if position not in wanted:
                continue
            result = _encode(image, None)
            if result.image is not None:
                writer.add(result.key, result.class_id, result.image)
            elif not skip_broken:
                raise broken_image(result.key, spec, result.error)
        if not len(writer):
            raise InputError(f"{spec} has no image that can be used")
        writer.finish(source.class_names, {"kind": source.kind, "max_size": None})
    return replace(open_beton(path), place=shown(os.fspath(spec))), len(source)


def _packed_path(
    spec: str | Path,
    max_size: int | None,
    skip_broken: bool,
    class_names: Sequence[str] | None,
    class_map: Mapping[str, str] | None,
) -> Path:
    names = None if class_names is None else list(class_names)
    settings = [INDEX_VERSION, source_state(spec), max_size, skip_broken, names]
    if class_map is not None:
        settings.append(list(class_map.items()))
    return cache_dir() / "betons" / f"{xxhash.xxh3_128_hexdigest(canonical_json(settings))}.beton"


def tell_of_source(source: Source | TarStreams, spec: str | Path, class_names: tuple[str, ...] | None = None) -> None:
    """Log what a source leaves out, and where it has no classes. class_names: of a source that has been streamed."""
    if (source.class_names if class_names is None else class_names) == (UNLABELLED,):
        _log.warning("%s has no class folders: its images can be labelled, but no model can be trained on them", spec)
    if source.passed_over:
        _log.warning("passed over %s of %s: %s", counted(len(source.passed_over), "file"), spec, source.passed_over)


def encode_all(
    source: Iterable[SourceImage], max_size: int | None = None, workers: int | None = None
) -> Iterator[EncodeResult]:
    """Results in the source's order; at most a few chunks per thread, and so many bytes, are on the way.

    Args:
        max_size: as of `pack`; workers: threads; None: one per processor.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    images = iter(source)
    pending: deque[tuple[int, Future[list[EncodeResult]]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="packing")
    try:
        while True:
            while len(pending) < 2 * workers + 2 and held < _MOST_HELD and (chunk := _take(images)):
                size = sum(image.held for image in chunk)
                held += size
                pending.append((size, pool.submit(lambda chunk: [_encode(image, max_size) for image in chunk], chunk)))
            if not pending:
                return
            size, future = pending.popleft()
            yield from future.result()
            held -= size
    finally:
        pool.shutdown(cancel_futures=True)
        if isinstance(images, Generator):
            images.close()  # and the connection that it reads from


def _take(images: Iterator[SourceImage]) -> list[SourceImage]:
    """The next images for a thread."""
    chunk: list[SourceImage] = []
    for image in images:
        chunk.append(image)
        if len(chunk) == _CHUNK or sum(each.held for each in chunk) >= _CHUNK_BYTES:
            break
    return chunk


def _encode(image: SourceImage, max_size: int | None) -> EncodeResult:
    encode = partial(EncodeResult, image.key, image.class_id)
    try:
        return encode(encode_image(image.data, max_size=max_size))
    except ImageError as error:
        return encode(None, error)


def broken_image(key: str, spec: str | Path, error: ImageError) -> ImageError:
    """The error for a broken image of a source, with what can be done about it."""
    return ImageError(
        f"the image {key!r} of {spec} {error}; {error.advice}, or leave broken images out with `skip_broken`"
    )


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when this process ends, however it ends."""
    try:
        stream = open(path, "wb")  # noqa: SIM115 (closed below; only the opening may fail in this way)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror or error}; choose another cache folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that packs the same images (%s)", path)
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError as error:  # a file system without locks
            raise TargetError(f"cannot lock {path}: {error.strerror or error}; choose another cache folder") from error
        yield


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names):,}: {shown}" + (", …" if len(names) > 3 else "")
