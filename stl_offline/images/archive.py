"""The bytes of a tar: its regular files and where they lie, with the whole archive's structure checked.

A tar is either looked through first, to read its files in any order (`tar_members`), or read once from first to last
(`stream_members`), which holds one file at a time in memory and works for tars on other machines.

Compressed tars are recognised by their first bytes, whatever their names. Of a tar that is read in any order, they are
unpacked into a nameless temporary file. Tars that were joined with ``cat`` are read to their end.
"""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import posixpath
import shutil
import struct
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stl_offline.errors import InputError
from stl_offline.images.common import is_image_name, is_system_name
from stl_offline.pixels import ImageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")

_BLOCK = 512
_COPY_BYTES = 1 << 20
# Long names and PAX records are text of some kB. More than this is damage, and would be read into memory.
_MAX_HEADER_BYTES = 1 << 20
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_OTHER_KINDS = {
    b"\x28\xb5\x2f\xfd": "is compressed with zstd; decompress it first (zstd -d)",
    b"PK\x03\x04": "is a zip archive; unpack it and give the folder",
    b"7z\xbc\xaf\x27\x1c": "is a 7z archive; unpack it and give the folder",
    b"Rar!": "is a rar archive; unpack it and give the folder",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull",
    b"<": "is a web page or XML, not a tar; download the tar again",
}
# What tarfile and the decompressors raise on bytes that are no tar.
_NOT_A_TAR = (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OverflowError, struct.error)


@dataclass(slots=True)
class Member:
    """A regular file in a tar: where its bytes lie."""

    archive: "Archive"
    name: str
    offset: int
    size: int

    @property
    def path(self) -> Path:
        """The tar."""
        return self.archive.path

    def read(self, size: int | None = None) -> bytes:
        """Its bytes, or the first ``size``; raises `ImageError` where the tar cannot be read or has become shorter."""
        return self.archive.read(self.name, self.offset, self.size if size is None else min(size, self.size))


class Archive:
    """A tar's bytes at any place.

    Raises:
        InputError: the file is compressed in a way that cannot be read, or is an archive of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unpacked: int | None = None
        with open(path, "rb") as stream:
            opener = _opener(stream.read(_BLOCK), path)
        if opener is not None:
            with opener(path) as packed, tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(packed, unpacked, _COPY_BYTES)
                unpacked.flush()
                self._unpacked = os.dup(unpacked.fileno())
            weakref.finalize(self, os.close, self._unpacked)

    def open(self) -> IO[bytes]:
        """The (unpacked) tar as a stream at its start."""
        if self._unpacked is None:
            return open(self.path, "rb")
        os.lseek(self._unpacked, 0, os.SEEK_SET)
        return open(self._unpacked, "rb", closefd=False)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """``size`` bytes of the member ``name``; raises `ImageError`."""
        try:
            if self._unpacked is not None:
                data = os.pread(self._unpacked, size, offset)
            else:
                with open(self.path, "rb", buffering=0) as stream:
                    data = os.pread(stream.fileno(), size, offset)
        except OSError as error:
            raise ImageError(f"cannot be read from {self.path}: {error.strerror or error}") from error
        if len(data) != size:
            raise ImageError(f"cannot be read: {self.path} ends within {name}")
        return data


@dataclass(slots=True)
class StreamedMember:
    """A regular file in a tar that is read from first to last: its bytes can be read until the next one is asked for.

    path: the tar.
    """

    path: str
    name: str
    size: int
    stream: IO[bytes]
    _held: bytes = b""

    def read(self, size: int | None = None) -> bytes:
        """Its bytes, or the first ``size``; may be called again. Raises EOFError where the tar ends within it."""
        wanted = self.size if size is None else min(size, self.size)
        if len(self._held) < wanted:
            self._held += self.stream.read(wanted - len(self._held))
        if len(self._held) < wanted:
            raise EOFError(f"it ends within {self.name}")
        return self._held[:wanted]


class _Header(tarfile.TarInfo):
    """A member's header, of a size that a member can have."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> "_Header":
        info = super().frombuf(*arguments, **options)
        if info.size < 0:
            raise ValueError(f"{info.name} has the size {info.size:,}")
        return info


class _Forward:
    """A stream that can only be read on, as far as tarfile asks for more: seeks forward, or back into the last read.

    Bytes that are passed over are read and dropped.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._end = 0  # up to where the stream was read
        self._last = b""  # the bytes before that
        self._back = 0  # how many of them are to be read again

    def tell(self) -> int:
        return self._end - self._back

    def seek(self, place: int) -> None:
        while place > self._end:
            self._back = 0
            if not self.read(min(place - self._end, _COPY_BYTES)):
                raise EOFError("unexpected end of data")
        self._back = self._end - place
        if self._back > len(self._last):
            raise ValueError(f"byte {place:,} has passed already")

    def read(self, size: int) -> bytes:
        again = self._last[len(self._last) - self._back :][:size]
        self._back -= len(again)
        parts, left = [again], size - len(again)
        # As files do: less than was asked for only at the end.
        while left and (data := self._stream.read(left)):
            parts.append(data)
            left -= len(data)
        self._end += size - left - len(again)
        found = b"".join(parts)
        if len(found) > len(again):
            kept = self._last + found[len(again) :] if len(found) < _BLOCK else found
            self._last = kept[-_COPY_BYTES:]
        return found


class _HeaderStream:
    """What tarfile reads headers from: ends the readings that a damaged header makes too long, or endless."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._empty = 0
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header claims to be {size:,} bytes long")
        data = self._stream.read(size)
        self._empty = 0 if data else self._empty + 1
        if self._empty > 2:  # tarfile waits for the rest of a sparse file's map
            raise EOFError("unexpected end of data")
        return data


def tar_members(path: Path) -> Iterator[Member]:
    """The regular files of a tar, with clean names, in its order.

    Raises:
        InputError: it cannot be read, is no tar, is cut off or damaged, or holds a link or a name that leads out of it.
    """
    with faults_of(path):
        archive = Archive(path)
        with archive.open() as stream:
            for name, info in _regular_files(stream, path):
                yield Member(archive, name, info.offset_data, info.size)


def stream_members(stream: io.BufferedReader, path: str) -> Iterator[StreamedMember]:
    """The regular files of a tar that is read once, from first to last, as `tar_members`. ``path``: for messages."""
    with faults_of(path):
        opener = _opener(stream.peek(_BLOCK)[:_BLOCK], path)
        forward = _Forward(stream if opener is None else opener(stream))
        for name, info in _regular_files(forward, path):
            # Of several headers (long names, PAX) the last one has just been read.
            forward.seek(info.offset_data)
            yield StreamedMember(path, name, info.size, forward)


@contextlib.contextmanager
def faults_of(path: Path | str) -> Iterator[None]:
    """Turn what reading a tar raises into an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except _NOT_A_TAR as error:
        raise InputError(f"{path} is no whole tar ({error}); copy it again") from error
    except OSError as error:
        # gzip and bz2 raise bare OSErrors on bytes that are not theirs.
        if error.errno is None:
            raise InputError(f"{path} is no whole tar ({error}); copy it again") from error
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _opener(head: bytes, path: Path | str) -> Callable[..., Any] | None:
    """What decompresses a file with these first bytes, or None; raises `InputError` for what cannot be a tar."""
    other = next((what for magic, what in _OTHER_KINDS.items() if head.startswith(magic)), None)
    # A tar begins with a member's name, which may be any of these; only a tar has its mark in the first block.
    if other is not None and head[257:262] != b"ustar":
        raise InputError(f"{path} {other}")
    return next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)


def _regular_files(stream: Any, path: Path | str) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The regular files of a tar with their clean names, in its order; checks that it is whole."""
    start: int | None = 0
    while start is not None:
        stream.seek(start)
        with tarfile.open(fileobj=_HeaderStream(stream), mode="r:", tarinfo=_Header) as tar:
            for info in tar:
                tar.members = []  # tarfile keeps every header it has seen; a large tar has millions
                name = _regular_name(info, path)
                if name is not None:
                    yield name, info
        start = _next_archive(stream, tar.offset, path)


def _regular_name(info: tarfile.TarInfo, path: Path | str) -> str | None:
    """The clean name of a regular file that is no system file; None for what is not."""
    if info.size < 0:
        raise InputError(f"{path}: {info.name} has the size {info.size:,}; the tar is damaged, copy it again")
    if info.name.startswith("/") or ".." in info.name.split("/"):
        raise InputError(
            f"{path}: the member name {info.name!r} points out of the tar; make the tar with relative names"
        )
    name = posixpath.normpath(info.name)
    if info.isdir() or any(map(is_system_name, name.split("/"))):
        return None
    if info.isreg() and not info.issparse():
        return name
    if not is_image_name(posixpath.basename(name)):
        return None
    if info.issparse():
        raise InputError(f"{path}: {name} is stored as a sparse file; make the tar without --sparse")
    if info.issym() or info.islnk():
        raise InputError(f"{path}: {name} is a link, not an image; make the tar with --dereference --hard-dereference")
    raise InputError(f"{path}: {name} is a pipe or device, not an image; make the tar without it")


def _next_archive(stream: Any, end: int, path: Path | str) -> int | None:
    """Where another tar begins behind the one that ends at ``end``; None where only zeros follow."""
    stream.seek(end)
    # tarfile takes any end for the end. A whole tar ends in blocks of zeros.
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK or block.strip(b"\0"):
        raise InputError(f"{path} is cut off or damaged after {end:,} bytes; copy it again")
    place = end + _BLOCK
    while data := stream.read(_COPY_BYTES):
        zeros = len(data) - len(data.lstrip(b"\0"))
        if zeros < len(data):
            return place + zeros // _BLOCK * _BLOCK
        place += len(data)
    return None
