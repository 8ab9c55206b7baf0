"""Masks and boxes as data sets give them: what is read, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.images.masks import read_masks

VOC = """<annotation><size><width>200</width><height>100</height><depth>3</depth></size>{}</annotation>"""
BOX = "<object><name>a</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def share(mask: np.ndarray, left: float, top: float, right: float, bottom: float) -> float:
    """The part of a box, in shares of the sides, that a mask covers."""
    rows, columns = mask.shape
    return mask[round(top * rows) : round(bottom * rows), round(left * columns) : round(right * columns)].mean()


def test_masks_lie_where_their_images_do(tmp_path):
    mask = np.zeros((6, 10), np.uint8)
    mask[1:3, 4:9] = 7
    (tmp_path / "a").mkdir()
    Image.fromarray(mask).save(tmp_path / "a" / "1.v2.png")
    Image.fromarray(np.stack([mask] * 3, -1)).save(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "3.xml").write_text(VOC.format(BOX.format(51, 1, 100, 25) + BOX.format(151, 76, 200, 100)))
    found = read_masks(tmp_path)
    for key in ("a/1.v2.JPEG", "a/2.jpg"):
        np.testing.assert_array_equal(found[key], mask > 0)
    boxes = found["a/3.JPEG"]
    assert share(boxes, 0.25, 0, 0.5, 0.25) == share(boxes, 0.75, 0.75, 1, 1) == 1
    assert boxes.mean() == 2 / 16
    assert found.get("a/4.jpg") is None and "b/1.jpg" not in found and len(found) == 3


def test_names_with_dots_are_not_cut_short(tmp_path):
    """Keys without an extension, too, may have a dot."""
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"img.v2": [0, 0, 0.5, 0.5], "img": [0, 0, 1, 1], "b.jpg": [0, 0, 0.5, 1]}))
    found = read_masks(path)
    assert [found[key].mean() for key in ("img.v2.jpg", "img.v2", "img.jpg", "img", "b.png", "b")] == [
        *[0.25] * 2, *[1] * 2, *[0.5] * 2,
    ]  # fmt: skip
    assert "img.v3.jpg" not in found
    path.write_text(json.dumps({"a/b.jpg": [0, 0, 0.5, 0.5], "a/b.png": [0, 0, 1, 1]}))
    found = read_masks(path)
    assert (found["a/b.jpg"].mean(), found["a/b.png"].mean()) == (0.25, 1)
    with pytest.raises(InputError, match="there are two masks for a/b"):
        found["a/b.webp"]


def test_boxes_by_key(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a/1.jpg": [0.0, 0.5, 0.25, 1.0], "a/2.jpg": [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]}))
    found = read_masks(path)
    assert share(found["a/1.jpg"], 0, 0.5, 0.25, 1) == 1 and found["a/1.png"].mean() == 1 / 8
    assert found["a/2.jpg"].mean() == 0.5


def test_boxes_in_pixels(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a/1.jpg": [0, 8, 16, 16], "a/2.jpg": [[0, 0, 1, 1], [4, 4, 9, 4]]}))
    found = read_masks(path, {"a/1.jpg": (64, 16), "a/2.jpg": (8, 8)})
    assert share(found["a/1.jpg"], 0, 0.5, 0.25, 1) == 1 and found["a/1.jpg"].mean() == 1 / 8
    with pytest.raises(InputError, match=r"the boxes of 'a/2.jpg' must be .* in pixels of the image's 8×8, got"):
        found["a/2.jpg"]
    with pytest.raises(InputError, match="has boxes in pixels, and the images' sizes are not known here"):
        read_masks(path)


@pytest.mark.parametrize("box", [[0, 0, 1], [0, 0, -1, 1], [0.5, 0, 0.2, 1], "box", [0, 0, float("nan"), 1], {}, None])
def test_a_box_that_is_none(box, tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps({"a": box}))
    with pytest.raises(InputError, match=r"the boxes of 'a.jpg' must be \[left, top, right, bottom\]"):
        read_masks(path)["a.jpg"]


def test_sources_that_hold_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "zip.npz").write_bytes(b"PK")
    np.savez(tmp_path / "pickled.npz", keys=np.array([{}], dtype=object), masks=np.zeros(1))
    np.savez(tmp_path / "flat.npz", keys=np.frombuffer(b'["a"]', np.uint8), masks=np.zeros((2, 3)))
    for name, reason in (
        ("nowhere.npz", "does not exist"),
        ("text.txt", "is none of these"),
        ("empty", "no file in it ends in .png or .xml"),
        ("list.json", "one JSON object"),
        ("deep.json", "cannot be read as JSON"),
        ("zip.npz", "holds no masks"),
        ("pickled.npz", "holds no masks"),
        ("flat.npz", r"1 keys and masks of the shape \(2, 3\)"),
    ):
        with pytest.raises(InputError, match=reason):
            read_masks(tmp_path / name)


def test_masks_that_cannot_be_read(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.xml").write_text("<annotation>")
    (tmp_path / "c.xml").write_text("<annotation/>")
    (tmp_path / "d.xml").write_text(VOC.format(BOX.format("x", 1, 2, 3)))
    (tmp_path / "e.xml").write_text(VOC.format(BOX.format(50, 1, 2, 3)))
    found = read_masks(tmp_path)
    for key in "abcde":
        with pytest.raises(InputError, match=rf"the mask .*{key}\.(png|xml) cannot be read"):
            found[f"{key}.jpg"]
    (tmp_path / "a.xml").write_text("<annotation/>")
    with pytest.raises(InputError, match="two masks for a"):
        read_masks(tmp_path)


def test_masks_in_linked_folders_are_found(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "a.xml").write_text("<annotation/>")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "n01").symlink_to(tmp_path / "far")
    assert list(read_masks(tmp_path / "masks")) == ["n01/a.xml"]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L"])
def test_an_alpha_channel_is_no_object(mode, tmp_path):
    pixels = np.zeros((6, 8), np.uint8)
    pixels[1:3, 4:7] = 255
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_masks(tmp_path)["a.jpg"], pixels > 0)
    if mode in ("RGBA", "LA"):  # what is not seen is no object, whatever its colour
        image.putalpha(Image.fromarray(np.where(np.arange(8) == 5, 0, 255).astype(np.uint8)[None].repeat(6, 0)))
        image.save(tmp_path / "a.png")
        np.testing.assert_array_equal(read_masks(tmp_path)["a.jpg"], (pixels > 0) & (np.arange(8) != 5))
