"""Images from timm's readers: data sets of Hugging Face, TensorFlow and torchvision, and timm's own folders and tars.

The words are timm's, with options behind a question mark: ``hfds/NAME?split=validation&root=FOLDER``. Class ids keep
the reader's numbering, so that models trained elsewhere on the same data fit.
"""

import io
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image
from timm.data import create_dataset, create_reader

from stl_offline.errors import InputError
from stl_offline.images.common import SourceImage, check_class_names, check_text, choose_class_names
from stl_offline.images.encode import ImageError, to_rgb

TIMM_PREFIXES = ("hfds/", "hfids/", "tfds/", "torch/", "wds/")


class TimmSource:
    """A timm reader. Keys are the reader's file names where it has them, else running numbers.

    A reader that gives decoded images (torchvision's arrays, tfds) gives their pixels as an uncompressed PPM file.
    """

    kind = "timm"

    def __init__(self, words: str, class_names: Sequence[str] | None = None) -> None:
        self._words = words
        self._reader = _open_reader(words)
        self._has_index = hasattr(self._reader, "__getitem__")
        self._keys = self._file_names()
        found = self._reader_class_names()
        # The reader's numbers, as places in the class list that is used.
        self.class_names = (
            check_class_names(found) if class_names is None else choose_class_names(found, class_names, words)
        )
        self._class_ids = [self.class_names.index(name) for name in found]

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[SourceImage]:
        for number, (image, target) in enumerate(self._samples()):
            key = self._keys[number] if self._keys else f"{number:08d}"
            data = _bytes_of(image)
            yield SourceImage(key, self._class_ids[self._target(target, key)], lambda data=data: data)

    def _samples(self) -> Iterator[tuple[Any, Any]]:
        items = (self._reader[number] for number in range(len(self))) if self._has_index else iter(self._reader)
        for item in items:
            yield item[0], item[1]

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
        except Exception:  # a reader without names has no one way to say so
            return []
        if any(not isinstance(name, str) or not name for name in names):
            return []
        names = [name.replace("\\", "/") for name in names]
        if any(posixpath.isabs(name) or ".." in name.split("/") for name in names):
            names = [posixpath.basename(name) for name in names]  # places on this machine are no keys
        if len(set(names)) != len(names):
            return []
        return [check_text(name, "file name") for name in names]

    def _reader_class_names(self) -> list[str]:
        reader = self._reader
        numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
        if numbers and sorted(numbers.values()) == list(range(len(numbers))):
            return [str(name) for name, _ in sorted(numbers.items(), key=lambda item: item[1])]
        # Without names the numbers must do: look at every target once.
        samples = self._samples()
        targets = reader.iter_targets() if hasattr(reader, "iter_targets") else (target for _, target in samples)
        try:
            last = max((int(target) for target in targets), default=-1)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self._words}: a class is no single whole number") from error
        if last < 0:
            raise InputError(f"{self._words} holds no images")
        return [str(number) for number in range(last + 1)]


def _open_reader(words: str) -> Any:
    name, _, query = words.partition("?")
    options: dict[str, Any] = dict(parse_qsl(query, keep_blank_values=True))
    if options.get("download", "").lower() in ("1", "true", "yes"):
        options["download"] = True
    else:
        options.pop("download", None)
    try:
        if name.startswith("torch/"):
            return create_dataset(name, **{"root": None, "split": "train", **options})
        return create_reader(name, **options)
    except Exception as error:  # whatever the data set's own library raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"timm cannot open {words!r}: {reason}") from error


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
