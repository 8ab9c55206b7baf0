"""One image: what is kept byte for byte, what is converted, what is refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from ffcv.libffcv import imdecode
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from stl_offline.errors import InputError
from stl_offline.images.encode import RAW_BYTES, content_hash, encode_image, key_hash
from stl_offline.pixels import ImageError


def ffcv_pixels(encoded):
    """What FFCV's own decoder makes of stored bytes; its return code must be good."""
    if encoded.mode == "raw":
        return np.frombuffer(encoded.data, np.uint8).reshape(encoded.height, encoded.width, 3)
    pixels = np.zeros((encoded.height, encoded.width, 3), np.uint8)
    source = np.frombuffer(encoded.data, np.uint8)
    height, width = encoded.height, encoded.width
    assert imdecode(source, pixels, height, width, height, width, 0, 0, 1, 1, False, False) == 0
    return pixels


def difference(a, b):
    return np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int))


def multi_image(photo, file_bytes):
    stream = io.BytesIO()
    photo().save(stream, "MPO", save_all=True, append_images=[photo(seed=5)])
    return stream.getvalue()


JPEGS = {
    "4:2:0": lambda photo, file_bytes: file_bytes(photo(), subsampling=2),
    "4:4:4": lambda photo, file_bytes: file_bytes(photo(), subsampling=0),
    "progressive": lambda photo, file_bytes: file_bytes(photo(), progressive=True),
    "restart markers": lambda photo, file_bytes: file_bytes(photo(), restart_marker_blocks=2),
    "coded as RGB": lambda photo, file_bytes: file_bytes(photo(), keep_rgb=True),
    "odd sides": lambda photo, file_bytes: file_bytes(photo(37, 101)),
    "one pixel": lambda photo, file_bytes: file_bytes(photo(48, 72).crop((0, 0, 1, 1))),
    "bytes after the end": lambda photo, file_bytes: file_bytes(photo()) + b"\0" * 99 + b"more",
    "comment": lambda photo, file_bytes: file_bytes(photo(), comment=b"x" * 5000),
    "two images": multi_image,
}


@pytest.mark.parametrize("kind", JPEGS)
def test_rgb_jpegs_are_kept_byte_for_byte(kind, photo, file_bytes):
    data = JPEGS[kind](photo, file_bytes)
    encoded = encode_image(data)
    assert encoded.data == data and encoded.mode == "jpg" and encoded.as_is
    with Image.open(io.BytesIO(data)) as image:
        assert (encoded.width, encoded.height) == image.size
        # Two decoders: the transforms and the upsampling round differently.
        assert difference(ffcv_pixels(encoded), image.convert("RGB")).mean() < 1.5


def test_orientation_is_ignored(photo, file_bytes):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    encoded = encode_image(file_bytes(photo(48, 72), exif=exif))
    assert (encoded.height, encoded.width) == (48, 72) and encoded.as_is


@pytest.mark.parametrize("progressive", [False, True])
def test_every_cut_of_a_jpeg_is_found(progressive, photo, file_bytes):
    data = file_bytes(photo(), progressive=progressive)
    for length in [*range(0, len(data), 41), len(data) - 2, len(data) - 1]:
        with pytest.raises(ImageError):
            encode_image(data[:length])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("zeros", [2, 100, 600])
def test_a_tail_of_zeros_is_found(zeros, progressive, photo, file_bytes):
    data = file_bytes(photo(), progressive=progressive)
    with pytest.raises(ImageError, match="cut off or damaged: Premature end|broken data stream"):
        encode_image(data[:-zeros] + bytes(zeros))


def test_damage_in_the_middle_that_pil_does_not_see_is_found(photo, file_bytes):
    data = file_bytes(photo(200, 300))
    half = len(data) // 2
    damaged = data[:half] + bytes(64) + data[half + 64 :]
    Image.open(io.BytesIO(damaged)).load()
    with pytest.raises(ImageError, match="Corrupt JPEG data"):
        encode_image(damaged)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_is_done_to_a_jpeg_training_can_decode_what_is_stored(data, photo, file_bytes):
    good = bytearray(file_bytes(photo(24, 40)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good) - 1))
        match data.draw(st.sampled_from(("flip", "insert", "delete"))):
            case "flip":
                good[place] ^= data.draw(st.integers(1, 255))
            case "insert":
                good[place:place] = data.draw(st.binary(min_size=1, max_size=30))
            case "delete":
                del good[place : place + data.draw(st.integers(1, 30))]
    try:
        encoded = encode_image(bytes(good))
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert ffcv_pixels(encoded).shape == (encoded.height, encoded.width, 3)


def test_stray_bytes_before_the_end_mark_do_no_harm(photo, file_bytes):
    data = file_bytes(photo())
    encoded = encode_image(data[:-2] + bytes(20) + data[-2:])
    assert encoded.mode == "jpg"
    assert difference(ffcv_pixels(encoded), ffcv_pixels(encode_image(data))).mean() < 2


def test_very_many_stray_bytes_are_damage(photo, file_bytes):
    data = file_bytes(photo())
    with pytest.raises(ImageError, match="extraneous bytes"):
        encode_image(data[:-2] + bytes(5000) + data[-2:])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is no image", "not an image of a known format"),
        (b"\xff\xd8\xff\xe0", "not an image|cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
    ],
)
def test_files_that_are_no_images(data, reason):
    with pytest.raises(ImageError, match=reason):
        encode_image(data)


def test_a_cut_or_damaged_png_is_found(photo, file_bytes):
    data = file_bytes(photo(), "PNG")
    middle = len(data) // 2
    for bad in (data[:middle], data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]):
        with pytest.raises(ImageError, match="cannot be decoded"):
            encode_image(bad)


def test_an_image_that_claims_to_be_huge_is_refused_before_memory_is_taken():
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0), b"IDAT")
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    with pytest.raises(ImageError, match=r"cannot be decoded: Image size \(3600000000 pixels\) exceeds limit"):
        encode_image(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


SMALL = {
    "png": lambda photo: (photo, "PNG", {}),
    "alpha": lambda photo: (Image.merge("RGBA", (*photo.split(), photo.getchannel(0))), "PNG", {}),
    "grey and alpha": lambda photo: (Image.merge("LA", (photo.getchannel(1), photo.getchannel(0))), "PNG", {}),
    "palette": lambda photo: (photo.quantize(17), "PNG", {}),
    "palette with a clear colour": lambda photo: (photo.quantize(17), "PNG", {"transparency": 3}),
    "palette with alphas": lambda photo: (photo.quantize(17), "PNG", {"transparency": bytes(range(17))}),
    "grey": lambda photo: (photo.convert("L"), "PNG", {}),
    "black and white": lambda photo: (photo.convert("1"), "PNG", {}),
    "gif": lambda photo: (photo.quantize(30), "GIF", {}),
    "bmp": lambda photo: (photo, "BMP", {}),
    "tiff in CMYK": lambda photo: (photo.convert("CMYK"), "TIFF", {}),
    "lossless webp": lambda photo: (photo, "WEBP", {"lossless": True}),
    "grey jpeg": lambda photo: (photo.convert("L"), "JPEG", {}),
    "cmyk jpeg": lambda photo: (photo.convert("CMYK"), "JPEG", {}),
}


@pytest.mark.parametrize("kind", SMALL)
def test_small_images_of_other_kinds_become_exact_rgb(kind, photo, file_bytes):
    image, file_kind, options = SMALL[kind](photo())
    data = file_bytes(image, file_kind, **options)
    encoded = encode_image(data)
    assert encoded.mode == "raw" and not encoded.as_is
    with Image.open(io.BytesIO(data)) as read:
        if "transparency" in read.info and read.mode == "P":
            read = read.convert("RGBA")
        assert (ffcv_pixels(encoded) == np.asarray(read.convert("RGB"))).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(file_bytes):
    values = np.linspace(0, 65_535, 12 * 30).reshape(12, 30).astype(np.uint16)
    pixels = ffcv_pixels(encode_image(file_bytes(Image.fromarray(values), "PNG")))
    assert (pixels == np.rint(values / 257)[..., None]).all()


@pytest.mark.parametrize("value", [-1, 65_536, 4_000_000])
def test_more_than_16_bits_are_refused(file_bytes, value):
    """Clipped, such an image would be white or black."""
    pixels = np.full((4, 6), 70, np.int32)
    encode_image(file_bytes(Image.fromarray(pixels), "TIFF"))
    pixels[2, 3] = value
    with pytest.raises(ImageError, match="more than 16 bits"):
        encode_image(file_bytes(Image.fromarray(pixels), "TIFF"))


def test_floating_point_pixels_are_refused(file_bytes):
    with pytest.raises(ImageError, match="floating-point"):
        encode_image(file_bytes(Image.fromarray(np.zeros((4, 6), np.float32)), "TIFF"))


def test_the_step_from_pixels_to_jpeg(photo, file_bytes):
    width = RAW_BYTES // (3 * 64)
    at = encode_image(file_bytes(photo(64, width), "PNG"))
    over = encode_image(file_bytes(photo(64, width + 1), "PNG"))
    assert (at.mode, over.mode) == ("raw", "jpg")
    with Image.open(io.BytesIO(over.data)) as image:
        assert JpegImagePlugin.get_sampling(image) == 0  # full resolution of colour
    assert difference(ffcv_pixels(over), photo(64, width + 1)).mean() < 4  # the noise of a sharp JPEG, no more


def test_a_large_grey_jpeg_keeps_its_quantisation(photo, file_bytes):
    data = file_bytes(photo(160, 250).convert("L"), quality=60)
    encoded = encode_image(data)
    with Image.open(io.BytesIO(data)) as before, Image.open(io.BytesIO(encoded.data)) as after:
        assert (encoded.mode, after.mode) == ("jpg", "RGB")
        assert after.quantization[0] == before.quantization[0]
        assert difference(ffcv_pixels(encoded), before.convert("RGB")).max() <= 3


def test_a_large_cmyk_jpeg_becomes_rgb(photo, file_bytes):
    data = file_bytes(photo(160, 250).convert("CMYK"), quality=90)
    encoded = encode_image(data)
    with Image.open(io.BytesIO(data)) as image:
        assert encoded.mode == "jpg"
        assert difference(ffcv_pixels(encoded), image.convert("RGB")).mean() < 4


@pytest.mark.parametrize(
    ("height", "width", "max_size", "expected"),
    [(100, 200, 50, (25, 50)), (200, 100, 50, (50, 25)), (150, 40, 149, (149, 40)), (3, 300, 20, (1, 20))],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_max_size_bounds_the_longer_side(kind, height, width, max_size, expected, photo, file_bytes):
    encoded = encode_image(file_bytes(photo(height, width), kind), max_size=max_size)
    assert (encoded.height, encoded.width) == expected and not encoded.as_is
    assert ffcv_pixels(encoded).shape == (*expected, 3)


def test_max_size_averages_and_leaves_small_images_alone(photo, file_bytes):
    stripes = np.zeros((128, 256, 3), np.uint8)
    stripes[:, ::2] = 255  # every other column: a sample that does not average sees black or white
    encoded = encode_image(file_bytes(Image.fromarray(stripes), "PNG"), max_size=64)
    assert difference(ffcv_pixels(encoded), 127)[:, 1:-1].max() <= 3
    data = file_bytes(photo(64, 48))
    assert encode_image(data, max_size=64).data == data
    assert encode_image(data, max_size=63).content_hash == encode_image(data).content_hash


def test_hashes_are_xxh3_64_of_bytes():
    # The published value for no input, and one computed by the reference implementation (xxhsum -H3).
    assert content_hash(b"") == key_hash("") == 0x2D06800538D394C2
    assert key_hash("größe/ß.jpg") == content_hash("größe/ß.jpg".encode())
    assert content_hash(b"a") != content_hash(b"b")
    with pytest.raises(InputError, match=r"the key 'a\\udcff' is not UTF-8"):
        key_hash("a\udcff")
