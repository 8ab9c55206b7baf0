"""The images of a page, found by key in any source and decoded as in training."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from stl_offline.errors import FormatError
from stl_offline.images.beton import Beton, open_beton
from stl_offline.images.common import Source, SourceImage
from stl_offline.images.encode import ImageError, content_hash, decode_jpeg, encode_image
from stl_offline.images.sources import open_source


@dataclass(frozen=True)
class FoundImage:
    """One image of a source. position: its number in the source, from which the loader derives its crops;
    content_hash: xxh3 of its bytes; load: returns RGB uint8 (H, W, 3)."""

    position: int
    content_hash: int
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class FoundImages:
    """Images by key, and the class list of their source."""

    class_names: tuple[str, ...]
    by_key: dict[str, FoundImage]


# (source, keys, class names) → the images with these keys, without those that the source lacks.
FindImages = Callable[[str, Iterable[str], tuple[str, ...]], FoundImages]


def find_images(spec: str | Path, keys: Iterable[str], class_names: tuple[str, ...]) -> FoundImages:
    """Find the images with these keys. Keys that the source lacks are left out.

    Nothing is packed, and no other image is read.

    Args:
        spec: a .beton, or what `open_source` takes.
        keys: which images.
        class_names: the class list that folders and tars are read with; a .beton has its own.

    Raises:
        InputError: the source cannot be used, or an image is damaged.
    """
    wanted = set(keys)
    if Path(spec).suffix == ".beton":
        return _from_beton(open_beton(spec), wanted)
    source = open_source(spec, class_names)
    return FoundImages(source.class_names, _from_source(source, wanted))


def _from_beton(beton: Beton, wanted: set[str]) -> FoundImages:
    found = {
        key: FoundImage(position, int(beton.content_hashes[position]), partial(beton.read_image, position))
        for position, key in enumerate(beton.keys)
        if key in wanted
    }
    return FoundImages(beton.class_names, found)


def _from_source(source: Source, wanted: set[str]) -> dict[str, FoundImage]:
    found = {}
    for position, image in enumerate(source):
        if image.key in wanted:
            data = _read(image)
            found[image.key] = FoundImage(position, content_hash(data), partial(_decode, image.key, data))
    return found


def _read(image: SourceImage) -> bytes:
    try:
        return image.data
    except ImageError as error:
        raise ImageError(f"the image {image.key} {error}") from error


def _decode(key: str, data: bytes) -> np.ndarray:
    try:
        encoded = encode_image(data)
    except ImageError as error:
        raise ImageError(f"the image {key} {error}") from error
    if encoded.mode == "raw":
        return np.frombuffer(encoded.data, np.uint8).reshape(encoded.height, encoded.width, 3)
    pixels, complaint = decode_jpeg(encoded.data, encoded.width, encoded.height)
    if complaint:
        raise FormatError(f"the image {key} does not decode: {complaint}")
    return pixels
