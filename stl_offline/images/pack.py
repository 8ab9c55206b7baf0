"""Packing: images of any source into one .beton, checked, in the source's order.

Images are read, checked and converted by threads (PIL and turbojpeg leave the interpreter lock; a thread, unlike a
process, cannot die unseen); their results are taken in order with a bounded number on the way, so the bytes do not
depend on how many threads there are.
"""

import contextlib
import fcntl
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import xxhash

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import atomic_path, cache_dir, canonical_json, make_folder
from stl_offline.images.beton import INDEX_VERSION, PAGE_SIZE, Beton, BetonWriter, open_beton
from stl_offline.images.common import SourceImage
from stl_offline.images.encode import EncodedImage, ImageError, encode_image
from stl_offline.images.sources import open_source, source_state
from stl_offline.progress import progress_bar

# Images that a thread takes at once: enough that small ones do not spend their time in queues.
_CHUNK = 16


@dataclass(frozen=True)
class PackReport:
    """What packing did. samples, stored_as_is, converted: images; classes; bytes: the file's size; skipped: (key,
    reason) of each broken image that was left out."""

    path: Path
    samples: int
    classes: int
    stored_as_is: int
    converted: int
    skipped: tuple[tuple[str, str], ...]
    bytes: int


@dataclass(frozen=True)
class _Result:
    key: str
    class_id: int
    image: EncodedImage | None
    reason: str


def pack(
    source_spec: str | Path,
    destination: str | Path,
    *,
    max_size: int | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    class_names: Sequence[str] | None = None,
    page_size: int = PAGE_SIZE,
) -> PackReport:
    """Write the images of a source into a .beton, which appears whole or not at all.

    Args:
        source_spec: what `open_source` takes.
        destination: a name that ends in ".beton"; a file of that name is replaced.
        max_size: pixels; images whose longer side is longer are made smaller.
        skip_broken: leave out (and report) images that cannot be decoded, instead of stopping.
        workers: threads; None: one per processor.
        class_names: the class list to use, else the source's own.
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
    source = open_source(source_spec, class_names)

    as_is = 0
    skipped: list[tuple[str, str]] = []
    with (
        atomic_path(destination) as temporary,
        open(temporary, "wb") as stream,
        progress_bar(len(source), "packing") as bar,
    ):
        writer = BetonWriter(stream, len(source), page_size)
        keys: set[str] = set()
        for result in _encode_all(source, max_size, workers):
            bar.update()
            if result.key in keys:
                raise InputError(f"{source_spec} gives the key {result.key!r} twice; every image needs its own")
            keys.add(result.key)
            if result.image is not None:
                writer.add(result.key, result.class_id, result.image)
                as_is += result.image.as_is
            elif skip_broken:
                skipped.append((result.key, result.reason))
            else:
                raise ImageError(
                    f"the image {result.key!r} of {source_spec} {result.reason}; mend or remove it, or leave broken "
                    "images out with --skip-broken"
                )
        if not len(writer):
            raise InputError(f"{source_spec} has no image that can be used; {len(skipped):,} are broken")
        writer.finish(source.class_names, {"kind": source.kind, "max_size": max_size})
        samples = len(writer)
    return PackReport(
        path=destination,
        samples=samples,
        classes=len(source.class_names),
        stored_as_is=as_is,
        converted=samples - as_is,
        skipped=tuple(skipped),
        bytes=destination.stat().st_size,
    )


def ensure_beton(
    spec: str | Path,
    *,
    max_size: int | None = None,
    skip_broken: bool = False,
    workers: int | None = None,
    class_names: Sequence[str] | None = None,
) -> Beton:
    """Open a .beton; pack anything else once, into the cache, and open that. Says on stderr what was done, and where.

    The packed file's name comes from what is packed (names, sizes and times of the files) and how, so changed images
    are packed again. Of several processes that want the same images, one packs and the others wait for it.

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
    path = _packed_path(spec, max_size, skip_broken, class_names)
    make_folder(path.parent)
    with _lock(path.with_suffix(".lock")):
        if path.exists():
            try:
                beton = open_beton(path)
            except FormatError as error:
                _say(f"packing again: {error}")
            else:
                _say(f"using packed images {path}")
                return beton
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed process: the lock says that none is alive
            left.unlink(missing_ok=True)
        report = pack(spec, path, max_size=max_size, skip_broken=skip_broken, workers=workers, class_names=class_names)
    _say(f"packed {report.samples:,} images of {report.classes:,} classes → {path}")
    for key, reason in report.skipped:
        _say(f"left out {key}: {reason}")
    return open_beton(path)


def find_packed(spec: str | Path, *, skip_broken: bool = False) -> Beton | None:
    """What `ensure_beton` would open without packing anything, or None. Raises as it does."""
    if os.fspath(spec).endswith(".beton"):
        return open_beton(spec)
    path = _packed_path(spec, None, skip_broken, None)
    with contextlib.suppress(FormatError):
        return open_beton(path) if path.exists() else None
    return None


def _packed_path(spec: str | Path, max_size: int | None, skip_broken: bool, class_names: Sequence[str] | None) -> Path:
    names = None if class_names is None else list(class_names)
    settings = [INDEX_VERSION, source_state(spec), max_size, skip_broken, names]
    return cache_dir() / "betons" / f"{xxhash.xxh3_128_hexdigest(canonical_json(settings))}.beton"


def _encode_all(source: Iterable[SourceImage], max_size: int | None, workers: int) -> Iterator[_Result]:
    """Results in the source's order; at most a few chunks per thread are on the way."""
    images = iter(source)
    pending: deque[Future[list[_Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="packing")
    try:
        while True:
            while len(pending) < 2 * workers + 2 and (chunk := list(islice(images, _CHUNK))):
                pending.append(pool.submit(lambda chunk: [_encode(image, max_size) for image in chunk], chunk))
            if not pending:
                return
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(image: SourceImage, max_size: int | None) -> _Result:
    encode = partial(_Result, image.key, image.class_id)
    try:
        return encode(encode_image(image.data, max_size=max_size), "")
    except ImageError as error:
        return encode(None, str(error))


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel frees when this process ends, however it ends."""
    try:
        stream = open(path, "wb")  # noqa: SIM115 (closed below; only the opening may fail in this way)
    except OSError as error:
        raise TargetError(f"cannot write {path}: {error.strerror or error}; choose another cache folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that packs the same images ({path})")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _say(line: str) -> None:
    if not os.environ.get("STL_OFFLINE_QUIET"):
        print(line, file=sys.stderr)


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return f"{len(names):,}: {shown}" + (", …" if len(names) > 3 else "")
