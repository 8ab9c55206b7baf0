"""The images of a page, found by key, stem or content in any source and decoded as in training."""

import contextlib
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from stl_offline.errors import FormatError, InputError
from stl_offline.images.beton import open_beton
from stl_offline.images.common import SourceImage
from stl_offline.images.encode import content_hash, decode_jpeg, encode_image
from stl_offline.images.sources import open_source
from stl_offline.pixels import ImageError
from stl_offline.reports.wanted import FoundImage, FoundImages, Wanted


def find_images(spec: str | Path, wanted: Wanted, class_names: tuple[str, ...] | None) -> FoundImages:
    """Find images. Those that the source lacks are left out.

    Nothing is packed, and no other image is read, but for ``match="content"``: then all are, up to the last one found.

    Args:
        spec: a .beton, or what `open_source` takes.
        class_names: the class list that folders and tars are read with (None: their own); a .beton has its own.

    Raises:
        InputError: the source cannot be used, an image is damaged, or two images have the same stem.
    """
    if Path(spec).suffix == ".beton":
        beton = open_beton(spec)
        hashes = beton.content_hashes.tolist()
        images = (
            (key, lambda position=position: FoundImage(position, hashes[position], partial(beton.read_image, position)))
            for position, key in enumerate(beton.keys)
        )
        return FoundImages(beton.class_names, _find(images, wanted))
    source = open_source(spec, class_names)
    images = ((image.key, partial(_read, position, image)) for position, image in enumerate(source))
    return FoundImages(source.class_names, _find(images, wanted))


def _find(images: Iterable[tuple[str, Callable[[], FoundImage]]], wanted: Wanted) -> dict[str, FoundImage]:
    """images: each one's key, and what reads it."""
    left = wanted.by_identity()
    found: dict[str, FoundImage] = {}
    first: dict[str | int, str] = {}
    for key, read in images:
        if wanted.match == "content":
            with contextlib.suppress(ImageError):  # not one of those wanted
                image = read()
                found |= dict.fromkeys(left.pop(image.content_hash, ()), image)
            if not left:
                break
            continue
        name = wanted.name(key)
        if name not in left:
            continue
        if name in first and wanted.match == "stem":
            raise InputError(
                f'the images {first[name]} and {key} have the same stem {name}; use `match="key"` or `match="content"`'
            )
        first[name] = key
        found[left[name][0]] = read()
    return found


def _read(position: int, image: SourceImage) -> FoundImage:
    try:
        data = image.data
    except ImageError as error:
        raise ImageError(f"the image {image.key} {error}") from error
    return FoundImage(position, content_hash(data), partial(_decode, image.key, data))


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
