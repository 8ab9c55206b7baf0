"""Images from timm's readers: data sets of Hugging Face, TensorFlow and torchvision, and timm's own folders and tars.

A reader is named as timm names it, with options after a question mark: ``hfds/NAME?split=validation&root=FOLDER``.
Class ids keep the reader's numbering, so that models trained elsewhere on the same data fit.
"""

import io
import logging
import os
import posixpath
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import xxhash
from PIL import Image
from timm.data import create_dataset, create_reader
from timm.data.readers.reader_image_folder import ReaderImageFolder

from stl_offline.errors import InputError
from stl_offline.images.classes import ClassChoice, check_class_names
from stl_offline.images.common import PassedOver, SourceImage, check_keys
from stl_offline.pixels import ImageError, to_rgb

_log = logging.getLogger(__name__)

TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")


class TimmSource:
    """A timm reader. Keys are the reader's file names where it has them, else running numbers.

    A reader that gives decoded images (torchvision's arrays, tfds) gives their pixels as an uncompressed PPM file.
    """

    kind = "timm"

    def __init__(self, words: str, choice: ClassChoice) -> None:
        self._words = words
        self.passed_over = PassedOver()
        self._reader = _open_reader(words)
        self._process, self._reading = os.getpid(), threading.Lock()
        self._keys = self._file_names()
        found = [choice.rename(name, words) for name in self._reader_class_names()]
        # The reader's numbers, as places in the class list that is used.
        self.class_names = check_class_names(found) if choice.names is None else choice.class_list(found, words)
        self._class_ids = [self.class_names.index(name) for name in found]

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[SourceImage]:
        """The images in order, with their bytes: each reader is read once."""
        given = 0
        for number, (image, target) in enumerate(_samples(self._reader)):
            if number < len(self):
                data = _bytes_of(image)
                yield self._image(number, target, lambda data=data: data)
            given = number + 1
        if given != len(self):
            # Readers of tars pass over what they cannot read, with no more than a warning.
            raise InputError(
                f"{self._words} announces {len(self):,} images and gives {given:,}: timm leaves out what it cannot "
                "read; give tars themselves, without wds/, so that faults are named, or the right number of images"
            )

    def listed(self) -> list[SourceImage]:
        """The images without their bytes, which are read from the reader when asked for, in any order.

        Raises:
            InputError: the reader gives images one after the other only.
        """
        if not hasattr(self._reader, "__getitem__"):
            raise InputError(
                f"{self._words} can only be read from first to last, and here images are read in any order; pack them "
                "first: stl-offline pack"
            )
        if isinstance(self._reader, ReaderImageFolder):
            targets = (target for _, target in self._reader.samples)
        else:
            targets = (target for _, target in _samples(self._reader))
        return [self._image(number, target, partial(self._read, number)) for number, target in enumerate(targets)]

    def _image(self, number: int, target: Any, load: Callable[[], bytes]) -> SourceImage:
        key = self._keys[number] if self._keys else f"{number:08d}"
        return SourceImage(key, self._class_ids[self._target(target, key)], load)

    def _read(self, number: int) -> bytes:
        if self._process != os.getpid():  # a fork shares the place in files that are open, and a lock as it was
            self._reader, self._process, self._reading = _open_reader(self._words), os.getpid(), threading.Lock()
        try:
            with self._reading:
                return _bytes_of(self._reader[number][0])
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error

    def _target(self, target: Any, key: str) -> int:
        try:
            number = int(target)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._words}: {key} has the class {target!r}, not one whole number") from error
        if not 0 <= number < len(self._class_ids):
            raise InputError(
                f"{self._words}: {key} has the class {number}, but the reader names {len(self._class_ids):,} classes"
            )
        return number

    def _file_names(self) -> list[str]:
        try:
            names = list(self._reader.filenames(absolute=False))
        except Exception:  # readers without names raise different errors
            return []
        if any(not isinstance(name, str) or not name for name in names):
            return []
        names = [name.replace("\\", "/") for name in names]
        if any(posixpath.isabs(name) or ".." in name.split("/") for name in names):
            names = [posixpath.basename(name) for name in names]  # places on this machine are no keys
        if len(set(names)) != len(names):
            return []
        check_keys(names, "file name")
        return names

    def _reader_class_names(self) -> list[str]:
        reader = self._reader
        numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        if numbers and sorted(numbers.values()) == list(range(len(numbers))):
            return [str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1])]
        # Without names the numbers must do: look at every target once.
        samples = _samples(reader)
        targets = reader.iter_targets() if hasattr(reader, "iter_targets") else (target for _, target in samples)
        try:
            last = max((int(target) for target in targets), default=-1)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._words}: a class is no single whole number") from error
        if last < 0:
            raise InputError(f"{self._words} holds no images")
        return [str(number) for number in range(last + 1)]


def timm_files(words: str) -> tuple[list[str], list[str]]:
    """What the images of a reader come from: (files, other marks of its content).

    Files are those that the reader names, or that its options name. The other mark is Hugging Face's fingerprint of a
    data set, or else a hash of all images: then the whole data set is read.

    Raises:
        InputError: timm cannot open it.
    """
    reader = _open_reader(words)
    _, options = _options(words)
    # A class map, or a tar in place of a root.
    files = sorted(str(value) for value in options.values() if os.path.isfile(str(value)))
    root = os.path.realpath(str(options.get("root", "")))
    if root in map(os.path.realpath, files):
        return files, []
    try:
        named = [os.path.realpath(name) for name in reader.filenames(absolute=True)]
    except Exception:  # as above
        named = []
    # Members of tars may be called as other files on this machine are: only names below the root are files.
    if named and all(name.startswith(root + os.sep) and os.path.isfile(name) for name in named):
        return files + named, []
    fingerprint = getattr(getattr(reader, "dataset", None), "_fingerprint", None)
    if isinstance(fingerprint, str):
        return files, [fingerprint]
    _log.info("reading all images of %s, because nothing else shows whether they changed", words)
    digest = xxhash.xxh3_128()
    for image, target in _samples(reader):
        digest.update(_bytes_of(image))
        digest.update(repr(target).encode())
    return files, [digest.hexdigest()]


def _samples(reader: Any) -> Iterator[tuple[Any, Any]]:
    items = (reader[number] for number in range(len(reader))) if hasattr(reader, "__getitem__") else iter(reader)
    for item in items:
        yield item[0], item[1]


def _options(words: str) -> tuple[str, dict[str, Any]]:
    name, _, query = words.partition("?")
    return name, dict(parse_qsl(query, keep_blank_values=True))


def _open_reader(words: str) -> Any:
    name, options = _options(words)
    if options.get("download", "").lower() in ("1", "true", "yes"):
        options["download"] = True
    else:
        options.pop("download", None)
    try:
        if name.startswith("torch/"):
            return create_dataset(name, **{"root": None, "split": "train", **options})
        reader = create_reader(name, **options)
    except Exception as error:  # whatever the data set's own library raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"timm cannot open {words!r}: {reason}") from error
    if hasattr(reader, "dist_num_replicas"):
        # Under torchrun a reader gives each process a part of the images: here every process wants all of them.
        reader.dist_rank, reader.dist_num_replicas = 0, 1
    return reader


def _bytes_of(image: Any) -> bytes:
    if isinstance(image, bytes):
        return image
    if not isinstance(image, Image.Image):
        with image:
            return image.read()
    try:
        stream = io.BytesIO()
        to_rgb(image).save(stream, "PPM")
    except ImageError:
        return b""  # becomes an error that names the key, where images are checked
    return stream.getvalue()
