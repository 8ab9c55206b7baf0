"""The bytes of a tar: its regular files and where they lie, with the whole archive's structure checked.

Compressed tars are recognised by their first bytes, whatever their names, and unpacked into a nameless temporary file.
Tars that were joined with ``cat`` are read to their end.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import shutil
import struct
import tarfile
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stl_offline.errors import InputError
from stl_offline.images.common import is_image_name, is_system_name
from stl_offline.images.encode import ImageError

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
            head = stream.read(_BLOCK)
        other = next((what for magic, what in _OTHER_KINDS.items() if head.startswith(magic)), None)
        # A tar begins with a member's name, which may be any of these; only a tar has its mark in the first block.
        if other is not None and head[257:262] != b"ustar":
            raise InputError(f"{path} {other}")
        opener = next((opener for magic, opener in _OPENERS.items() if head.startswith(magic)), None)
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


class _Header(tarfile.TarInfo):
    """A member's header, of a size that a member can have."""

    @classmethod
    def frombuf(cls, *arguments: Any, **options: Any) -> "_Header":
        info = super().frombuf(*arguments, **options)
        if info.size < 0:
            raise ValueError(f"{info.name} has the size {info.size:,}")
        return info


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
    try:
        archive = Archive(path)
        with archive.open() as stream:
            start: int | None = 0
            while start is not None:
                stream.seek(start)
                with tarfile.open(fileobj=_HeaderStream(stream), mode="r:", tarinfo=_Header) as tar:
                    for info in tar:
                        tar.members = []  # tarfile keeps every header it has seen; a large tar has millions
                        member = _regular(archive, info)
                        if member is not None:
                            yield member
                start = _next_archive(stream, tar.offset, path)
    except InputError:
        raise
    except _NOT_A_TAR as error:
        raise InputError(f"{path} is no whole tar ({error}); copy it again") from error
    except OSError as error:
        # gzip and bz2 raise bare OSErrors on bytes that are not theirs.
        if error.errno is None:
            raise InputError(f"{path} is no whole tar ({error}); copy it again") from error
        raise InputError(f"cannot read {path}: {error.strerror}") from error


def _regular(archive: Archive, info: tarfile.TarInfo) -> Member | None:
    """A member, if it is a regular file and no system file."""
    path = archive.path
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
        return Member(archive, name, info.offset_data, info.size)
    if not is_image_name(posixpath.basename(name)):
        return None
    if info.issparse():
        raise InputError(f"{path}: {name} is stored as a sparse file; make the tar without --sparse")
    if info.issym() or info.islnk():
        raise InputError(f"{path}: {name} is a link, not an image; make the tar with --dereference --hard-dereference")
    raise InputError(f"{path}: {name} is a pipe or device, not an image; make the tar without it")


def _next_archive(stream: IO[bytes], end: int, path: Path) -> int | None:
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
