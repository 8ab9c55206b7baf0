"""Where the files of a label set lie: a folder of this machine, or an object store that fsspec knows by its URL.

Files are small in number and read or written whole. Reads and writes over a network are tried again when they fail,
and what was read is compared with a checksum by those who know it, so a connection that dies in the middle costs time
but never gives half a file.
"""

import concurrent.futures
import contextlib
import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stl_offline.errors import FormatError, InputError, StlError, TargetError
from stl_offline.files import atomic_write, check_writable, make_folder
from stl_offline.progress import progress_bar
from stl_offline.remote import PACKAGES, one_line, open_filesystem, persist, protocol_of

T = TypeVar("T")
R = TypeVar("R")

PART_BYTES = 8 << 20
# For a file whose folder other processes remove meanwhile.
_FOLDER_TRIES, _FOLDER_WAIT_SECONDS = 40, 0.05
# Files that travel at the same time, unless a command is given another number.
TRANSFERS = 8

# Stores whose client creates an object only where there is none (If-None-Match, or the store's own form of it).
# Elsewhere a look comes first, so that two processes that come at the same instant may both write.
_CONDITIONAL = ("s3", "s3a", "gs", "gcs", "memory")


class Storage(Protocol):
    """A flat set of named files. ``place`` names it in messages; ``local`` is its folder where it is one."""

    place: str
    local: Path | None

    def read(self, name: str, size: int | None = None) -> bytes:
        """A file's bytes; FileNotFoundError where there is none. ``size``, where it is known, lets large ones come in
        parts, so that a connection that breaks costs one part."""
        ...

    def size(self, name: str) -> int | None:
        """A file's size in bytes, or None where there is none."""
        ...

    def names(self, folder: str = "") -> list[str]:
        """The names of the files (and folders) in a folder, sorted; empty where there is none."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Store a file whole; raises TargetError."""
        ...

    def create(self, name: str, data: bytes) -> bytes:
        """Store a file unless there is one; gives the bytes that lie there now. Raises TargetError.

        Of several processes that create one name with different bytes, one gets its own back. So does a process whose
        first try arrived although the answer did not.
        """
        ...

    def replace(self, name: str, data: bytes, expected: bytes) -> bytes:
        """Store a file in place of one that holds ``expected``; gives the bytes that lie there now. Raises TargetError,
        and FileNotFoundError where there is none."""
        ...

    def stamps(self, folder: str) -> dict[str, str]:
        """The names of the files in a folder, each with a text that changes when the file is written again."""
        ...

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The names of the files in a folder with their sizes in bytes, from one listing."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing where there is none."""
        ...

    def remove_file(self, name: str) -> None:
        """Remove a file, in one request; nothing where there is none."""
        ...

    def check_writable(self) -> None:
        """Raise TargetError where it is known, without writing, that nothing can be written."""
        ...

    def free_bytes(self) -> int | None:
        """Bytes free there; None where that is not known."""
        ...


class FolderStorage:
    """Files in a folder of this machine (or one that it shares with others).

    The folder itself may be a symbolic link. Below it no link is followed, since it could lead a command to read,
    publish, overwrite or delete files outside of the label set: every method raises FormatError, with the link's name.
    """

    def __init__(self, path: Path) -> None:
        self.place = str(path)
        self.local = path

    def path(self, name: str) -> Path:
        """The path of a file or folder of the set, which need not exist.

        Raises:
            FormatError: it is a symbolic link, or lies behind one.
        """
        path = self.local
        for part in Path(name).parts:
            path = path / part
            if path.is_symlink():
                raise _linked(path)
        return path

    def read(self, name: str, size: int | None = None) -> bytes:
        path = self.path(name)
        try:
            # Without O_NONBLOCK, opening a named pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise _linked(path) from error
            if error.errno == errno.ENXIO:  # a socket, or a device that is not there
                raise _irregular(path) from error
            raise
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise _irregular(path)
            with open(descriptor, "rb", closefd=False) as stream:
                return stream.read()
        finally:
            os.close(descriptor)

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).lstat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path(folder)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data, exclusive=False)

    def create(self, name: str, data: bytes) -> bytes:
        while True:
            with contextlib.suppress(FileExistsError):
                self._put(name, data, exclusive=True)
                return data
            with contextlib.suppress(FileNotFoundError):  # removed again meanwhile
                return self.read(name)

    def replace(self, name: str, data: bytes, expected: bytes) -> bytes:
        path = self.path(name)
        while True:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                # Who replaced it meanwhile held the lock of the old file.
                if os.fstat(descriptor).st_ino != os.stat(path).st_ino:
                    continue
                found = self.read(name)
                if found == expected:
                    self._put(name, data, exclusive=False)
                    return data
                return found
            finally:
                os.close(descriptor)

    def _put(self, name: str, data: bytes, *, exclusive: bool) -> None:
        path = self.path(name)
        for attempt in range(_FOLDER_TRIES):
            make_folder(path.parent)
            try:
                return atomic_write(path, data, exclusive=exclusive)
            except TargetError as error:
                # Workers that find the label set finished remove the folder, each of them once.
                if attempt == _FOLDER_TRIES - 1 or not isinstance(error.__cause__, FileNotFoundError):
                    raise
                time.sleep(_FOLDER_WAIT_SECONDS)

    def stamps(self, folder: str) -> dict[str, str]:
        return {name: f"{found.st_mtime_ns} {found.st_ino}" for name, found in self._stats(folder)}

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: found.st_size for name, found in self._stats(folder)}

    def _stats(self, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        path = self.path(folder)
        for name in self.names(folder):
            with contextlib.suppress(FileNotFoundError):
                yield name, (path / name).lstat()

    def remove(self, name: str) -> None:
        path = self.path(name)
        try:
            # No look at what it is: another process may remove it, or make it again, in between.
            path.unlink(missing_ok=True)
        except (IsADirectoryError, PermissionError):  # a folder, on Linux and elsewhere
            for inner in self.names(name):
                self.remove(f"{name}/{inner}")
            with contextlib.suppress(OSError):
                path.rmdir()

    def remove_file(self, name: str) -> None:
        self.path(name).unlink(missing_ok=True)

    def check_writable(self) -> None:
        check_writable(self.local)

    def free_bytes(self) -> int | None:
        path = self.local.absolute()
        return shutil.disk_usage(next(each for each in (path, *path.parents) if each.exists())).free


class ObjectStorage:
    """Files below a URL such as ``s3://bucket/labels``. An object appears whole or not at all: so stores promise."""

    def __init__(self, url: str, **options: object) -> None:
        self.place = url.rstrip("/")
        self.local = None
        protocol = protocol_of(self.place)
        self._has_folders = protocol not in PACKAGES
        self._is_conditional = protocol in _CONDITIONAL
        # Without fsspec's memory of listings, which other processes' writes would make wrong.
        self._files, self._root = open_filesystem(self.place, "a label set", use_listings_cache=False, **options)

    @property
    def filesystem(self) -> tuple[Any, str]:
        """fsspec's filesystem, and the path of the folder in it."""
        return self._files, self._root

    def read(self, name: str, size: int | None = None) -> bytes:
        what, path = f"read {self.place}/{name}", self._path(name)
        if size is None or size <= PART_BYTES:
            return self._persist(what, InputError, lambda: self._files.cat_file(path))

        def part(start: int) -> bytes:
            return self._files.cat_file(path, start=start, end=min(start + PART_BYTES, size))

        return b"".join(self._persist(what, InputError, partial(part, start)) for start in range(0, size, PART_BYTES))

    def size(self, name: str) -> int | None:
        self._forget()
        try:
            return self._persist(
                f"look at {self.place}/{name}", InputError, lambda: self._files.info(self._path(name))["size"]
            )
        except FileNotFoundError:
            return None

    def names(self, folder: str = "") -> list[str]:
        return sorted(self._list(folder))

    def stamps(self, folder: str) -> dict[str, str]:
        # Which entries a store's client gives differs: a checksum, a date, both.
        return {name: str(sorted(found.items(), key=str)) for name, found in self._list(folder).items()}

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: found["size"] or 0 for name, found in self._list(folder).items()}

    def _forget(self) -> None:
        # The hub's client remembers listings whatever it is asked for.
        if self.place.startswith("hf://"):
            self._files.invalidate_cache()

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        self._forget()
        try:
            found = self._persist(
                f"list {self.place}/{folder}", InputError, lambda: self._files.ls(self._path(folder), detail=True)
            )
        except (FileNotFoundError, NotADirectoryError):
            return {}
        inside = {each["name"].strip("/"): each for each in found}
        # Some stores list the folder itself, as an empty object.
        inside.pop(self._path(folder).strip("/"), None)
        return {path.rpartition("/")[2]: each for path, each in inside.items()}

    def write(self, name: str, data: bytes) -> None:
        self._put(name, data)

    def create(self, name: str, data: bytes) -> bytes:
        while True:
            with contextlib.suppress(FileExistsError):
                if self._is_conditional:
                    self._put(name, data, mode="create")
                    return data
                if self.size(name) is None:
                    self._put(name, data)
                    return data
            with contextlib.suppress(FileNotFoundError):  # removed again meanwhile
                return self.read(name)

    def replace(self, name: str, data: bytes, expected: bytes) -> bytes:
        what, path = f"replace {self.place}/{name}", self._path(name)
        while True:
            # The mark first: a file that changes in between has another one.
            found = self._persist(what, TargetError, lambda: self._files.info(path))
            lying = self.read(name)
            if lying != expected:
                return lying
            mark = found.get("ETag") if protocol_of(self.place) in ("s3", "s3a") else None
            with contextlib.suppress(FileExistsError):
                self._put(name, data, **({} if mark is None else {"IfMatch": mark}))
                return data

    def _put(self, name: str, data: bytes, **options: object) -> None:
        path = self._path(name)

        def put() -> None:
            # Never in a store of buckets: there it would make the bucket.
            if self._has_folders:
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._files.pipe_file(path, data, **options)

        what = f"write {self.place}/{name}"
        try:
            self._persist(what, TargetError, put)
        except FileNotFoundError as error:
            raise TargetError(f"cannot {what}: {one_line(error)}; is there such a bucket?") from error

    def remove(self, name: str) -> None:
        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm(self._path(name), recursive=True)

        self._persist(f"remove {self.place}/{name}", TargetError, delete)

    def remove_file(self, name: str) -> None:
        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._files.rm_file(self._path(name))

        self._persist(f"remove {self.place}/{name}", TargetError, delete)

    def check_writable(self) -> None:
        """Nothing: a store tells only when something is written."""

    def free_bytes(self) -> int | None:
        return None

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _persist(self, what: str, kind: type[StlError], action: Callable[[], T]) -> T:
        """Call it, and again if the store or the network fails; FileNotFoundError and FileExistsError pass through."""
        return persist(what, kind, action, _pass_refusal)


def open_storage(place: str | Path, **options: object) -> FolderStorage | ObjectStorage:
    """The storage at a path or a URL; ``options`` go to fsspec. Raises InputError, MissingExtraError."""
    text = str(place)
    if "://" not in text:
        return FolderStorage(Path(place))
    if not text.partition("://")[2].strip("/"):
        # fsspec takes what is left, such as s3:, for the name of a folder here.
        raise InputError(f"{text} names no place; give the whole address, such as s3://bucket/labels")
    if text.startswith(("file://", "local://")):
        return FolderStorage(Path(text.partition("://")[2]))
    return ObjectStorage(text, **options)


def each_shard(
    work: Callable[[T], R], items: Sequence[T], title: str, *, workers: int = 0, transfer: bool = False
) -> Iterator[R]:
    """The results of ``work`` on each item, in order, from threads, with a progress bar named ``title``.

    Decompression, checksums and networks let other threads run. The first error ends the others.

    Args:
        workers: shards worked on, and in memory, at the same time; 0 means one per core, at most `TRANSFERS`.
        transfer: the work waits for a network, so 0 means `TRANSFERS` whatever the number of cores.

    Raises:
        InputError: a negative number of workers.
    """
    if workers < 0:
        raise InputError(f"`workers` must be at least 0, got {workers}")
    threads = workers or (TRANSFERS if transfer else min(TRANSFERS, os.cpu_count() or 1))
    with (
        progress_bar(len(items), title, "shard", enabled=bool(items)) as progress,
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for result in pool.map(work, items):
                progress.update()
                yield result
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _linked(path: Path) -> FormatError:
    return FormatError(f"{path} is a symbolic link, which label sets do not follow; replace it by what it points to")


def _pass_refusal(error: Exception) -> None:
    """Raise FileExistsError where a condition of the request was not met: s3fs turns that answer into an OSError like
    many others."""
    answer = getattr(error.__cause__, "response", None) or {}
    if answer.get("Error", {}).get("Code") in ("PreconditionFailed", "412"):
        raise FileExistsError(one_line(error)) from error


def _irregular(path: Path) -> FormatError:
    return FormatError(f"{path} is not a regular file; replace it by one")
