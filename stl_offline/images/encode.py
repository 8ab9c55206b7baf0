"""One image: checked by a full decode, and made into what a .beton stores.

A three-component JPEG that decodes without a complaint is kept byte for byte. Everything else becomes RGB as timm's and
torchvision's loaders do it (``convert("RGB")``: alpha is dropped, a palette looked up), and is stored as plain pixels
where that is small, else as a JPEG of high quality. EXIF orientation is ignored, as those loaders and FFCV ignore it.

The check is made by the decoder that training uses (FFCV's turbojpeg), whose warnings tell damage that PIL passes over.
"""

import ctypes
import io
import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xxhash
from ffcv.libffcv import imdecode
from ffcv.libffcv import lib as ffcv_library
from PIL import Image, JpegImagePlugin

from stl_offline.errors import InputError
from stl_offline.pixels import IMAGE_FORMATS, ImageError, one_line, to_rgb

# An image that is not a JPEG is stored as pixels up to this many bytes (147 × 147 pixels): exact, quick to read, and
# not much bigger than a JPEG of high quality.
RAW_BYTES = 65_536
JPEG_QUALITY = 95
MAX_SIDE = 65_500  # libjpeg's limit

_SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm pbm pnm avif"
IMAGE_SUFFIXES = frozenset("." + suffix for suffix in _SUFFIXES.split())
IMAGE_HEAD = 32  # bytes that `is_image_head` looks at
# A JPEG may have this many pixels where it is to be made smaller: checking it decodes it whole, 3 bytes a pixel.
_MAX_SHRUNK_PIXELS = 1 << 30
# turbojpeg keeps the first warning of a decode. These mean that pixels are lost or invented.
_DAMAGE = re.compile(r"premature end|bad huffman|instead of rst|arithmetic code|inconsistent progress", re.IGNORECASE)
_STRAY_BYTES = re.compile(r"(\d+) extraneous bytes before marker (\w+)")
# Some cameras and editors leave a few stray bytes before the end mark. Many stray bytes mean a decoder out of step.
_FEW_STRAY_BYTES = 1024

_last_jpeg_message = getattr(ffcv_library, "tjGetErrorStr", None)
if _last_jpeg_message is not None:
    _last_jpeg_message.restype = ctypes.c_char_p


# mode, width, height, bytes
_Stored = tuple[str, int, int, bytes]


@dataclass(frozen=True)
class EncodedImage:
    """What a .beton stores of an image.

    mode: "jpg" (``data`` is a JPEG file) or "raw" (``data`` is height × width × 3 bytes of RGB); content_hash: xxh3_64
    of the source's bytes; as_is: ``data`` is the source, byte for byte.
    """

    mode: Literal["jpg", "raw"]
    width: int
    height: int
    data: bytes
    content_hash: int
    as_is: bool


def content_hash(data: bytes) -> int:
    """xxh3_64 of a source's bytes, as an unsigned integer."""
    return xxhash.xxh3_64_intdigest(data)


def key_hash(key: str) -> int:
    """xxh3_64 of a key's UTF-8 bytes, as an unsigned integer. Raises InputError where a key has none."""
    try:
        return xxhash.xxh3_64_intdigest(key.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"the key {key!r} is not UTF-8; rename the image") from error


def is_image_head(head: bytes) -> bool:
    """Whether a file begins as an image. TIFF is left to names: the raw files of cameras begin in the same way."""
    return (
        head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a"))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[4:12] in (b"ftypavif", b"ftypavis")
        or (
            head[:2] == b"BM"
            and head[6:10] == bytes(4)
            and head[14:18] in (b"\x28\0\0\0", b"\x6c\0\0\0", b"\x7c\0\0\0")
        )
    )


def encode_image(data: bytes, *, max_size: int | None = None) -> EncodedImage:
    """Check an image's bytes by decoding all of them, and give what a .beton stores.

    Args:
        data: the bytes of an image file.
        max_size: pixels; an image whose longer side is longer is made smaller (antialiased), keeping its shape.

    Raises:
        ImageError: the bytes are no image, cut off, damaged, or have no meaning as RGB.
    """
    if not data:
        raise ImageError("the file is empty")
    image = _open(data, max_size)
    if image.format in ("JPEG", "MPO"):
        mode, width, height, stored = _encode_jpeg(image, data, max_size)
    else:
        mode, width, height, stored = _store(_shrink(to_rgb(image), max_size), RAW_BYTES)
    return EncodedImage(mode, width, height, stored, content_hash(data), as_is=stored is data)


def decode_jpeg(data: bytes, width: int, height: int) -> tuple[np.ndarray, str]:
    """Decode as training does: RGB uint8 (height, width, 3), and the decoder's complaint ("" where it has none)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    source = np.frombuffer(data, np.uint8)
    if imdecode(source, pixels, height, width, height, width, 0, 0, 1, 1, False, False) == 0:
        return pixels, ""
    message = _last_jpeg_message() if _last_jpeg_message is not None else None
    return pixels, (message or b"").decode(errors="replace") or "unknown error"


def decode(data: bytes) -> Image.Image:
    """The image of a file's bytes as 8-bit RGB, by Pillow.

    Raises:
        ImageError: as `encode_image`.
    """
    if not data:
        raise ImageError("the file is empty")
    return to_rgb(_open(data, None))


def _open(data: bytes, max_size: int | None) -> Image.Image:
    try:
        if data.startswith(b"\xff\xd8\xff"):
            # What Image.open calls for a JPEG, without Pillow's limit: an image that is to be shrunk may exceed it.
            image = JpegImagePlugin.jpeg_factory(io.BytesIO(data))
        else:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
    except Image.DecompressionBombError as error:
        raise ImageError(f"cannot be decoded: {one_line(error)}", "make it smaller with another program") from error
    except (Image.UnidentifiedImageError, SyntaxError) as error:
        raise ImageError("is not an image of a known format") from error
    except Exception as error:  # PIL's readers raise nearly every built-in on bad bytes
        raise ImageError(f"cannot be decoded: {one_line(error)}") from error
    width, height = image.size
    if min(width, height) < 1:
        raise ImageError(f"has no pixels: {width} × {height}")
    usual = 2 * (Image.MAX_IMAGE_PIXELS or _MAX_SHRUNK_PIXELS)
    if width * height > (usual if max_size is None else _MAX_SHRUNK_PIXELS):
        advice = "shrink such images with `max_size`" if max_size is None else "make it smaller first"
        raise ImageError(f"is {width} × {height} pixels, which is too large to train on", advice)
    return image


def _encode_jpeg(image: Image.Image, data: bytes, max_size: int | None) -> _Stored:
    if image.mode not in ("RGB", "L"):  # CMYK and YCCK: the training decoder has no conversion for them
        return _store(_shrink(to_rgb(image), max_size), RAW_BYTES)
    width, height = image.size
    tables = getattr(image, "quantization", None)
    pixels, complaint = decode_jpeg(data, width, height)
    if complaint:
        stray = _STRAY_BYTES.search(complaint)
        if _DAMAGE.search(complaint) or (stray and int(stray[1]) > _FEW_STRAY_BYTES):
            raise ImageError(f"is cut off or damaged: {complaint}")
        # Harmless to PIL, but training could not tell this complaint from damage: store what PIL reads.
        whole = to_rgb(image)
    elif image.mode == "RGB":
        if max_size is None or max(width, height) <= max_size:
            return "jpg", width, height, data
        whole = Image.fromarray(pixels)
    else:
        whole = to_rgb(image)
    smaller = _shrink(whole, max_size)
    if smaller is whole and tables:
        # The same size and the same quantisation: next to nothing is lost a second time.
        sampling = JpegImagePlugin.get_sampling(image) if image.mode == "RGB" else 2  # grey has no colour to sample
        return _store(whole, RAW_BYTES if image.mode == "L" else 0, qtables=tables, subsampling=max(sampling, 0))
    return _store(smaller, 0)


def _shrink(image: Image.Image, max_size: int | None) -> Image.Image:
    longer = max(image.size)
    if max_size is None or longer <= max_size:
        return image
    width, height = (max(1, round(side * max_size / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)


def _store(image: Image.Image, raw_bytes: int, **jpeg_options: Any) -> _Stored:
    width, height = image.size
    if width * height * 3 <= raw_bytes:
        return "raw", width, height, image.tobytes()
    if max(width, height) > MAX_SIDE:
        raise ImageError(
            f"is {width} × {height} pixels, a side over {MAX_SIDE:,}", "shrink such images with `max_size`"
        )
    stream = io.BytesIO()
    image.save(stream, "JPEG", **(jpeg_options or {"quality": JPEG_QUALITY, "subsampling": 0}))
    return "jpg", width, height, stream.getvalue()
