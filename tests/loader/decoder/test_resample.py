"""Resizing against torchvision and OpenCV, and decoding at a DCT scale against the whole decode.

H, W: an image's size; h, w: the output's.
"""

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from torchvision.transforms import InterpolationMode

from stl_offline.compiled import read_only
from stl_offline.config import INTERPOLATIONS
from stl_offline.geometry import whole_views
from stl_offline.images.beton import BetonWriter, open_beton
from stl_offline.images.encode import encode_image
from stl_offline.loader.decoder.decode import choose_shrink
from stl_offline.loader.decoder.planes import Planes
from stl_offline.loader.decoder.resize import line_floats, make_filters, resize_pixels, resize_planes
from tests.loader.decoder.test_pixels import by_area, shown


@njit
def call_resize_pixels(*arguments):
    resize_pixels(*arguments)


@njit
def call_resize_planes(*arguments):
    resize_planes(*arguments)


def expected(pixels, size, interpolation):
    """uint8 (H, W, 3) → float (h, w, 3), by torchvision with antialiasing, or OpenCV's area."""
    if interpolation == "area":
        return by_area(pixels, size)
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    resized = tv.resize(image, list(size), InterpolationMode[interpolation.upper()], antialias=True)
    return resized.clamp(0, 255).permute(1, 2, 0).numpy()


def resized(pixels, box, size, interpolation, mirrored=False):
    """A box (top, left, height, width) of uint8 (H, W, 3) by our filters: uint8 (h, w, 3)."""
    target = np.zeros((size[0], 3 * size[1]), dtype=np.uint8)
    lines = np.zeros(line_floats(pixels.shape[1], size[1]), dtype=np.float32)
    top, left, height, width = box
    kind = INTERPOLATIONS.index(interpolation)
    filters = make_filters(kind, *size)
    box = (top, top + height, left, left + width)
    call_resize_pixels(read_only(pixels.ravel()), 3 * pixels.shape[1], box, mirrored, filters, lines, target)
    return target.reshape(*size, 3)


def resized_planes(planes, box, size, interpolation, mirrored=False):
    """The same of three planes of Y, Cb and Cr, all of one size."""
    target = np.zeros((size[0], 3 * size[1]), dtype=np.uint8)
    lines = np.zeros(line_floats(planes[0].shape[1], size[1]), dtype=np.float32)
    box = tuple(np.float64(number) for number in box)
    kind = INTERPOLATIONS.index(interpolation)
    # The planes lie behind each other, after some bytes of something else.
    data = np.concatenate([np.full(5, 255, dtype=np.uint8), *(plane.ravel() for plane in planes)])
    sizes = planes[0].shape
    call_resize_planes(read_only(data), Planes(5, *sizes, 1, 1), box, sizes, 1, mirrored, kind, lines, target)
    return target.reshape(*size, 3)


def as_red_green_blue(ycc):
    """JFIF 1.02, section 7: float (…, 3) → float (…, 3) within 0 … 255."""
    y, cb, cr = ycc[..., 0], ycc[..., 1] - 128, ycc[..., 2] - 128
    return np.stack([y + 1.402 * cr, y - 0.34414 * cb - 0.71414 * cr, y + 1.772 * cb], axis=-1).clip(0, 255)


sides = st.integers(1, 40)


@settings(deadline=None, max_examples=120)
@given(
    shape=st.tuples(sides, sides), size=st.tuples(sides, sides), kind=st.sampled_from(INTERPOLATIONS), data=st.data()
)
def test_filters_are_those_of_torchvision_and_opencv(shape, size, kind, data):
    top, left = (data.draw(st.integers(0, side - 1)) for side in shape)
    height, width = (data.draw(st.integers(1, side - start)) for side, start in zip(shape, (top, left), strict=True))
    mirrored = data.draw(st.booleans())
    pixels = np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), dtype=np.uint8)
    ours = resized(pixels, (top, left, height, width), size, kind, mirrored)
    theirs = expected(np.ascontiguousarray(pixels[top : top + height, left : left + width]), size, kind)
    assert np.abs(ours.astype(float) - (theirs[:, ::-1] if mirrored else theirs)).max() <= 0.51


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(sides, sides), size=st.tuples(sides, sides), kind=st.sampled_from(INTERPOLATIONS), data=st.data()
)
def test_planes_are_filtered_before_they_are_turned_to_colours(shape, size, kind, data):
    top, left = (data.draw(st.integers(0, side - 1)) for side in shape)
    height, width = shape[0] - top, shape[1] - left
    mirrored = data.draw(st.booleans())
    # Colours near grey: where none is clipped, filters and the change of colours may be swapped.
    pixels = np.random.default_rng(sum(shape)).integers((90, 110, 110), (170, 146, 146), (*shape, 3), dtype=np.uint8)
    planes = tuple(np.ascontiguousarray(pixels[..., channel]) for channel in range(3))
    ours = resized_planes(planes, (top, left, height, width), size, kind, mirrored)
    theirs = as_red_green_blue(expected(np.ascontiguousarray(pixels[top:, left:]), size, kind))
    assert np.abs(ours.astype(float) - (theirs[:, ::-1] if mirrored else theirs)).max() <= 0.51


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 3)])
def test_the_smallest_boxes_and_the_longest_filters(interpolation, shape):
    # One pixel out of a large box takes a filter as long as the box, and every output of a one-pixel box is that pixel.
    pixels = np.random.default_rng(5).integers(0, 256, (61, 47, 3), dtype=np.uint8)
    for box in ((0, 0, 61, 47), (60, 46, 1, 1), (13, 0, 1, 47), (0, 46, 61, 1)):
        top, left, height, width = box
        cut = np.ascontiguousarray(pixels[top : top + height, left : left + width])
        for mirrored in (False, True):
            ours = resized(pixels, box, shape, interpolation, mirrored).astype(float)
            theirs = expected(cut, shape, interpolation)
            assert np.abs(ours - (theirs[:, ::-1] if mirrored else theirs)).max() <= 0.51


def large_image(number):
    """Waves and edges of all widths, about as sharp as a photograph: uint8 (H, W, 3)."""
    draw = np.random.default_rng(number)
    height, width = 331 - 7 * number, 402 + 9 * number
    y, x = np.mgrid[:height, :width]
    image = np.zeros((height, width, 3))
    for wave in range(2, 40):
        angle, phase = draw.uniform(0, np.pi, 2)
        slope = np.cos(angle) * x + np.sin(angle) * y
        image += np.sin(slope * wave / 40 + phase)[..., None] * draw.uniform(20, 60, 3) / wave
    for _ in range(12):
        top, left = draw.integers(0, height - 30), draw.integers(0, width - 30)
        image[top : top + draw.integers(5, 90), left : left + draw.integers(5, 90)] += draw.uniform(-70, 70, 3)
    return (image + 128).clip(0, 255).astype(np.uint8)


# OpenCV's number of the sampling: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1. Then whether it is progressive, and how often it
# has restart marks: both are kinds of which no rows can be left out.
KINDS = [(0x111111, 0, 0), (0x211111, 0, 0), (0x221111, 0, 0), (0x121111, 0, 0), (0x411111, 0, 0)]
KINDS += [(0x221111, 1, 0), (0x221111, 0, 3)]


def as_jpeg(image, sampling, progressive, restarts):
    flags = [cv2.IMWRITE_JPEG_QUALITY, 92, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling]
    flags += [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, restarts]
    return cv2.imencode(".jpg", image[..., ::-1], flags)[1].tobytes()


@pytest.fixture(scope="module")
def jpegs():
    return [as_jpeg(large_image(number), *kind) for number, kind in enumerate(KINDS)]


@pytest.fixture(scope="module")
def large(jpegs, tmp_path_factory):
    """A .beton of one large JPEG of each kind."""
    path = tmp_path_factory.mktemp("large") / "large.beton"
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, len(jpegs))
        for number, data in enumerate(jpegs):
            image = encode_image(data)
            assert image.as_is
            writer.add(f"{number}", 0, image)
        writer.finish(("one",), {"kind": "test"})
    return open_beton(path)


@pytest.fixture(scope="module")
def whole(jpegs):
    """Each decoded whole by libjpeg, through OpenCV."""
    return [cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1] for data in jpegs]


def box_views(beton, boxes):
    """Views (n, 6) of one box of pixels (top, left, height, width) for each image."""
    views = whole_views(len(beton))
    for view, (top, left, h, w), height, width in zip(views, boxes, beton.heights, beton.widths, strict=True):
        view[:] = (w / width, 0, left / width, 0, h / height, top / height)
    return views


def sharpness(image):
    image = image.astype(np.float64)
    return np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean()


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(("ratio", "worst", "least"), [(1.4, 1.5, 0.99), (2.6, 4.0, 0.9), (6.2, 4.0, 0.9)])
def test_crops_are_as_sharp_as_of_the_whole_decode(load, large, whole, interpolation, ratio, worst, least):
    h, w = round(20 * ratio), round(28 * ratio)
    boxes = [(11 + 5 * number, 17 + 3 * number, h, w) for number in range(len(large))]
    images = shown(load(large, interpolation=interpolation), box_views(large, boxes))
    shares = []
    for sample, (top, left, h, w) in enumerate(boxes):
        best = expected(np.ascontiguousarray(whole[sample][top : top + h, left : left + w]), (20, 28), interpolation)
        error = images[sample] - best
        shares.append(sharpness(images[sample]) / sharpness(best))
        assert np.sqrt((error**2).mean()) < worst
        assert abs(error.mean()) < 0.5
    assert min(shares) > least
    assert max(shares) < 1.1


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(20, 28), (50, 70)])
def test_pixels_stay_the_same_when_rows_below_are_left_out(load, large, interpolation, size):
    # The first reading decodes all rows, the later ones no more than they need; a replayed view must not change.
    draw = np.random.default_rng(1)
    loader = load(large, image_size=size, interpolation=interpolation)
    for _ in range(12):
        boxes = [
            (draw.integers(0, 120), draw.integers(0, 90), draw.integers(20, 150), draw.integers(60, 300)) for _ in KINDS
        ]
        views = box_views(large, boxes)
        first = shown(load(large, image_size=size, interpolation=interpolation), views)
        for sample, pixels in shown(loader, views).items():
            np.testing.assert_array_equal(pixels, first[sample])


def test_a_jpeg_is_shrunk_only_where_its_crop_is_large():
    area, bilinear, bicubic = range(3)
    ratios = (1, 1.9, 2, 2.4, 2.5, 5.9, 6, 11.9, 12, 50)
    shrinks = {kind: [choose_shrink(kind, 20 * n, 35 * n, 20, 30) for n in ratios] for kind in range(3)}
    assert shrinks[bilinear] == [1, 1, 2, 2, 2, 2, 4, 4, 8, 8]
    assert shrinks[area] == shrinks[bicubic] == [1, 1, 1, 1, 2, 2, 4, 4, 8, 8]
    # The axis along which less is to spare decides; where nothing is resized, pixels come as they are.
    assert choose_shrink(bilinear, 60, 2000, 40, 20) == 1
    assert {choose_shrink(kind, 50, 40, 50, 40) for kind in range(3)} == {0}
