"""Images in tars: webdataset's samples, or a class-per-folder tree that somebody put into a tar.

A sample is every member whose path is the same up to the first dot of its base name (webdataset's rule); that part is
the key. Its class stands in a ``.cls`` member, or in a ``.json`` member's ``class_name`` or ``label``; where no sample
has one, the class is the name of the folder that the member lies in.
"""

import gzip
import json
import os
import posixpath
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from stl_offline.errors import InputError
from stl_offline.images.common import SourceImage, check_text, choose_class_names, is_image_name
from stl_offline.images.encode import ImageError

_BLOCK = 512
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(slots=True)
class _Member:
    """A file in a tar: where its bytes lie."""

    archive: "_Archive"
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        return self.archive.read(self.name, self.offset, self.size)


@dataclass(slots=True)
class _Sample:
    """One sample: its image members and its class by the extension that said so."""

    images: list[_Member] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str | None:
        return self.labels.get("cls", self.labels.get("json"))


class TarSource:
    """One or more tars. Keys are member paths without their extensions, in sorted order over all tars."""

    kind = "tar"

    def __init__(self, paths: Sequence[Path], class_names: Sequence[str] | None = None) -> None:
        samples: dict[str, _Sample] = {}
        for path in paths:
            mine = _read_samples(path)
            double = samples.keys() & mine.keys()
            if double:
                raise InputError(
                    f"{len(double):,} keys of {path} are in an earlier tar too, for example {min(double)!r}; "
                    "every sample needs a name of its own"
                )
            samples |= mine
        where = str(paths[0]) if len(paths) == 1 else f"{paths[0]} … {paths[-1]}"
        samples = {key: sample for key, sample in samples.items() if sample.images}
        if not samples:
            raise InputError(f"{where} holds no images")
        self._keys = sorted(samples)
        labels = _labels(samples, where)
        self.class_names = choose_class_names(labels.values(), class_names, where)
        class_ids = {name: number for number, name in enumerate(self.class_names)}
        self._class_ids = [class_ids[labels[key]] for key in self._keys]
        self._members = [_one_image(key, samples[key]) for key in self._keys]

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[SourceImage]:
        for key, class_id, member in zip(self._keys, self._class_ids, self._members, strict=True):
            yield SourceImage(key, class_id, partial(member.read))


class _Archive:
    """A tar's bytes at any place. A compressed tar is unpacked into a nameless temporary file first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unpacked: int | None = None
        if path.suffix in (".gz", ".tgz"):
            with gzip.open(path) as packed, tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
                unpacked.flush()
                self._unpacked = os.dup(unpacked.fileno())
            weakref.finalize(self, os.close, self._unpacked)

    def open(self) -> IO[bytes]:
        if self._unpacked is None:
            return open(self.path, "rb")
        os.lseek(self._unpacked, 0, os.SEEK_SET)
        return open(self._unpacked, "rb", closefd=False)

    def read(self, name: str, offset: int, size: int) -> bytes:
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


def _read_samples(path: Path) -> dict[str, _Sample]:
    samples: dict[str, _Sample] = {}
    for member in _members(path):
        folder, base = posixpath.split(member.name)
        stem, _, extension = base.partition(".")
        key = posixpath.join(folder, stem)
        if is_image_name(base):
            samples.setdefault(check_text(key, "member name"), _Sample()).images.append(member)
        elif extension in ("cls", "json"):
            label = _label(member, extension)
            if label is not None:
                samples.setdefault(check_text(key, "member name"), _Sample()).labels[extension] = label
    return samples


def _members(path: Path) -> Iterator[_Member]:
    """The regular files of a tar, with clean names; the whole tar's structure is checked."""
    try:
        archive = _Archive(path)
        with archive.open() as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for info in tar:
                tar.members = []  # tarfile keeps every header it has seen; a big tar has millions
                name = _clean_name(info.name, path)
                if any(part.startswith(".") for part in name.split("/")) or info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    if is_image_name(posixpath.basename(name)):
                        raise InputError(f"{path}: {name} is a link, not an image; make the tar with --dereference")
                    continue
                yield _Member(archive, name, info.offset_data, info.size)
            # tarfile takes any end for the end. A whole tar ends in blocks of zeros.
            stream.seek(tar.offset)
            end = stream.read(_BLOCK)
            if len(end) < _BLOCK or end.strip(b"\0"):
                raise InputError(f"{path} is cut off or damaged after {tar.offset:,} bytes; copy it again")
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is no whole tar ({error}); copy it again") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _clean_name(name: str, path: Path) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{path}: the member name {name!r} points out of the tar; make the tar with relative names")
    return posixpath.normpath(name)


def _label(member: _Member, extension: str) -> str | None:
    where = f"{member.archive.path}: {member.name}"
    try:
        text = member.read().decode()
        value = json.loads(text) if extension == "json" else text.strip()
    except ValueError as error:
        raise InputError(f"{where} cannot be read as a class: {error}") from error
    if extension == "json":
        value = value if isinstance(value, dict) else {}
        value = value.get("class_name", value.get("label"))
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise InputError(f"{where} has the class {value!r}; a class is a name or a whole number")
    return check_text(str(value), "class name")


def _labels(samples: dict[str, _Sample], where: str) -> dict[str, str]:
    without = sorted(key for key, sample in samples.items() if sample.label is None)
    if without and len(without) < len(samples):
        raise InputError(
            f"{where}: {len(without):,} of {len(samples):,} samples have no class, for example {without[0]!r}; "
            "give each a .cls member"
        )
    if not without:
        return {key: str(sample.label) for key, sample in samples.items()}
    labels = {key: posixpath.basename(posixpath.dirname(key)) for key in samples}
    if not all(labels.values()):
        bare = min(key for key, label in labels.items() if not label)
        raise InputError(f"{where}: the sample {bare!r} has no class; add .cls members, or put classes into folders")
    return labels


def _one_image(key: str, sample: _Sample) -> _Member:
    # "a.jpg" is the image of "a"; "a.mask.png" is something else about it, unless "a" has no other image.
    plain = [member for member in sample.images if posixpath.basename(member.name).count(".") == 1]
    images = plain or sample.images
    if len(images) > 1:
        names = ", ".join(member.name for member in images[:3])
        raise InputError(
            f"the sample {key!r} has {len(images)} images ({names}): names that differ only after their first dot "
            "are one sample; rename them"
        )
    return images[0]
