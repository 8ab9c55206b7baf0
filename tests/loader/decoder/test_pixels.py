"""What a student sees: the right pixels, cut, resized, mirrored and normalised."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.geometry import View, whole_views
from stl_offline.images.beton import BetonWriter, open_beton
from stl_offline.images.encode import encode_image
from stl_offline.loader.decoder.decode import pixel_box
from stl_offline.loader.decoder.planes import frame_size


def shown(loader, views, epoch=0, **settings):
    """Every sample's pixels as loaded: uint8 {sample id: (H, W, 3)}."""
    images = {}
    for batch in loader.epoch(epoch, views, **settings):
        pixels = (batch.images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        images |= dict(zip(batch.sample_ids.tolist(), pixels, strict=True))
    return images


def boxes(beton, views):
    """(top, bottom, left, right, flipped) of each view, by geometry."""
    for height, width, view in zip(beton.heights, beton.widths, views, strict=True):
        left, top, w, h, flipped = View.from_array(view).box()
        yield round(top * height), round((top + h) * height), round(left * width), round((left + w) * width), flipped


def test_the_whole_image_at_its_own_size_is_what_pillow_decodes(load, beton, decoded):
    assert beton.raw.any()
    assert not beton.raw.all()
    for size in sorted({image.shape[:2] for image in decoded}):
        samples = [number for number, image in enumerate(decoded) if image.shape[:2] == size]
        images = shown(load(image_size=size), whole_views(len(beton)), sample_ids=np.array(samples))
        for sample in samples:
            np.testing.assert_array_equal(images[sample], decoded[sample])


@pytest.mark.parametrize("flipped", [False, True])
def test_a_crop_of_the_outputs_size_is_a_cut(load, beton, decoded, flipped):
    views = []
    for number, (height, width) in enumerate(zip(beton.heights, beton.widths, strict=True)):
        view = View.crop((number % 5) / width, (number % 4) / height, 28 / width, 20 / height)
        views.append((view.flipped() if flipped else view).matrix.ravel())
    images = shown(load(), np.array(views))
    assert len(images) == len(beton)
    for sample, pixels in images.items():
        cut = decoded[sample][sample % 4 : sample % 4 + 20, sample % 5 : sample % 5 + 28]
        np.testing.assert_array_equal(pixels, cut[:, ::-1] if flipped else cut)


def by_area(pixels, size):
    """OpenCV's area: (H, W, 3) → float (h, w, 3). One axis after the other: where one axis grows and one shrinks, at
    once it would take its filter for growing along both."""
    across = cv2.resize(pixels.astype(np.float32), (size[1], len(pixels)), interpolation=cv2.INTER_AREA)
    return cv2.resize(across, size[::-1], interpolation=cv2.INTER_AREA)


@pytest.mark.parametrize("workers", [1, 2])
def test_random_crops_are_cut_and_resized_by_area(load, beton, decoded, views, workers):
    images = shown(load(workers=workers), views)
    flips = 0
    for sample, (top, bottom, left, right, flipped) in enumerate(boxes(beton, views)):
        expected = by_area(decoded[sample][top:bottom, left:right], (20, 28))
        expected = expected[:, ::-1] if flipped else expected
        flips += flipped
        # A JPEG's colours are rounded and clipped once here; libjpeg does it after enlarging and after turning to RGB.
        error = np.abs(images[sample] - expected)
        assert error.max() <= (1 if beton.raw[sample] else 3.5)
        assert error.mean() < 0.5
    assert 0 < flips < len(beton)


def test_the_size_in_a_frame_header_is_pillows(beton, decoded):
    jpegs = [sample for sample in range(len(beton)) if not beton.raw[sample]]
    assert len(jpegs) > 10
    for sample in jpegs:
        data = np.frombuffer(beton.stored_bytes(sample), dtype=np.uint8)
        assert frame_size(data) == decoded[sample].shape[:2]
        # What it does not understand is left to libjpeg: nothing, another start, a fill byte before a mark.
        odd = (data[:3], np.zeros_like(data), np.insert(data, 2, 0xFF))
        assert {frame_size(each) for each in odd} == {(0, 0)}


def test_an_image_with_fill_bytes_before_its_marks_is_read(load, tmp_path):
    pixels = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (40, 52, 3), dtype=np.uint8), (9, 9), 3)
    jpeg = cv2.imencode(".jpg", pixels)[1]
    path = tmp_path / "filled.beton"
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, 1)
        image = encode_image(np.insert(jpeg, 2, 0xFF).tobytes())
        assert image.as_is
        writer.add("filled", 0, image)
        writer.finish(("one",), {"kind": "test"})
    filled = open_beton(path)
    pixels = shown(load(filled, image_size=(40, 52)), whole_views(1))[0]
    np.testing.assert_array_equal(pixels, cv2.imdecode(jpeg, cv2.IMREAD_COLOR)[..., ::-1])


def test_replayed_views_show_the_same_pixels(load, views):
    first = shown(load(batch_size=5, workers=2, seed=1), views, epoch=0)
    again = shown(load(batch_size=3, workers=1, seed=2), views.copy(), epoch=7)
    assert first.keys() == again.keys()
    for sample, pixels in first.items():
        np.testing.assert_array_equal(pixels, again[sample])


def test_views_change_between_epochs_of_one_loader(load, beton, views):
    loader = load()
    crops, whole = shown(loader, views), shown(loader, whole_views(len(beton)), epoch=1)
    assert sum((crops[sample] != whole[sample]).any() for sample in crops) > len(beton) - 3
    np.testing.assert_array_equal(crops[4], shown(loader, views, epoch=2)[4])


def test_an_unknown_interpolation_is_refused(load):
    with pytest.raises(InputError, match="area, bilinear, bicubic; got 'lanczos'"):
        load(interpolation="lanczos")


def test_images_are_normalised_per_channel(load, beton, decoded, views):
    plain = load(shuffle=False)
    scaled = load(shuffle=False, mean=(0.1, 0.5, 0.9), std=(0.2, 0.25, 0.5))
    for a, b in zip(plain.epoch(0, views), scaled.epoch(0, views), strict=True):
        expected = (a.images - torch.tensor([0.1, 0.5, 0.9]).view(3, 1, 1)) / torch.tensor([0.2, 0.25, 0.5]).view(
            3, 1, 1
        )
        torch.testing.assert_close(b.images, expected, atol=2e-6, rtol=1e-5)
        assert b.images.dtype == torch.float32
        assert b.images.shape[1:] == (3, 20, 28)
        assert b.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        ([0.7, 0.7, 0.1, -0.7, 0.7, 0.5], "not an axis-aligned crop"),
        ([1, 0, 0, 0, -1, 1], "not an axis-aligned crop"),
        ([0, 0, 0, 0, 1, 0], "not an axis-aligned crop"),
        ([0.5, 0, 0.6, 0, 0.5, 0], "leaves the image"),
        ([-0.5, 0, 0.4, 0, 0.5, 0], "leaves the image"),
        ([0.5, 0, 0, 0, 0.5, np.nan], "leaves the image"),
    ],
)
def test_views_that_are_no_crop_of_the_image_are_refused_at_once(load, beton, view, reason):
    views = whole_views(len(beton))
    views[5] = view
    with pytest.raises(InputError, match=f"sample 5 .*{reason}"):
        load().epoch(0, views)


def test_of_some_samples_only_their_views_are_checked(load, beton, views):
    wrong = views.copy()
    wrong[5] = np.nan
    expected = torch.cat([batch.images for batch in load().epoch(0, views, sample_ids=np.array([7, 0, 6]))])
    found = torch.cat([batch.images for batch in load().epoch(0, wrong, sample_ids=np.array([7, 0, 6]))])
    assert torch.equal(found, expected)
    with pytest.raises(InputError, match="sample 5 is"):
        load().epoch(0, wrong, sample_ids=np.array([7, 5, 6]))


def test_views_of_another_data_set_are_refused(load, beton):
    with pytest.raises(InputError, match=r"\(23, 6\)"):
        load().epoch(0, whole_views(len(beton) - 1))


def test_boxes_keep_a_pixel_and_stay_inside():
    tiny = np.array([1e-6, 0, 1 - 1e-6, 0, 1e-6, 0.5], dtype=np.float32)
    assert pixel_box(tiny, 10, 30) == (5, 6, 29, 30, False)
    mirrored = np.array([-1, 0, 1, 0, 1, 0], dtype=np.float32)
    assert pixel_box(mirrored, 10, 30) == (0, 10, 0, 30, True)


@pytest.mark.parametrize("sampling", [(4, 2), (2, 4), (1, 4), (3, 1)])
def test_colours_of_an_unusual_sampling(load, tmp_path, sampling):
    """TurboJPEG has no name for some samplings, refuses to read their heads, and decodes them. So do packers."""
    across, down = sampling
    height, width = 8 * down * (96 // (8 * down)), 8 * across * (120 // (8 * across))
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "JPEG", subsampling=0)
    data = bytearray(stream.getvalue())
    head, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[head + 11] = across << 4 | down  # of the brightness; colours keep 1 × 1
    # Every block has the difference 0 and nothing else: grey, in the standard's Huffman codes.
    blocks = ("001010" * across * down + "0000" * 2) * (width * height // (64 * across * down))
    bits = blocks + "1" * (-len(blocks) % 8)
    data[scan + 14 :] = int(bits, 2).to_bytes(len(bits) // 8, "big") + b"\xff\xd9"
    image = encode_image(bytes(data))
    with open(tmp_path / "x.beton", "wb") as out:
        writer = BetonWriter(out, 2)
        for key in "ab":
            writer.add(key, 0, image)
        writer.finish(("grey",), {"kind": "folder"})
    beton = open_beton(tmp_path / "x.beton")
    views = np.array([View.crop(0.1, 0.2, 0.7, 0.6).matrix.ravel()] * 2, np.float32)
    for epoch in range(2):  # of sound images later readings decode only a part
        for pixels in shown(load(beton, batch_size=2), views, epoch).values():
            np.testing.assert_allclose(pixels.astype(int), 128, atol=1)
