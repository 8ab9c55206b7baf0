"""Images with masks: found and matched by name, checked as a whole, cropped together."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from stl_offline.errors import InputError
from stl_offline.transfer.crops import DenseCrops, cut
from stl_offline.transfer.pairs import NO_CLASS, class_list, decode_mask, find_pairs, open_pairs
from tests.transfer.conftest import CLASSES, COLOURS, IGNORE, png, scene, write_folders, write_tar


def test_folders_and_tars(scenes):
    folder, tar = scenes
    pairs = open_pairs(folder, CLASSES, IGNORE)
    assert pairs.keys == [f"images/a/{number}" for number in range(10)]
    assert [(pair.height, pair.width) for pair in pairs.pairs[:3]] == [(40, 56), (43, 51), (40, 46)]
    image, mask = pairs.read(1)
    expected = scene(1, 43, 51)[1].astype(int)
    np.testing.assert_array_equal(mask, np.where(expected == IGNORE, NO_CLASS, expected))
    assert image.size == (51, 43)
    np.testing.assert_array_equal(
        pairs.pixels, sum(np.bincount(pairs.read(n)[1].ravel() + 1, minlength=4)[1:] for n in range(10))
    )
    assert [pair.key for pair in find_pairs(tar)][5:7] == ["set/train/25", "set/val/30"]
    assert open_pairs(tar, CLASSES, IGNORE, "val").keys == ["set/val/30", "set/val/31", "set/val/32"]
    assert open_pairs(tar, CLASSES, IGNORE, "val").fingerprint != open_pairs(tar, CLASSES, IGNORE).fingerprint


def test_a_mask_of_16_bits_or_with_a_palette_counts_by_its_ids():
    ids = np.array([[0, 1, 300], [2, 700, 1]], np.uint16)
    np.testing.assert_array_equal(decode_mask(png(ids), "x", 701, 300), [[0, 1, -1], [2, 700, 1]])
    palette = Image.fromarray(ids.astype(np.uint8) % 3).convert("P")
    palette.putdata([0, 2, 1, 1, 0, 2])
    assert decode_mask(png(np.asarray(palette)), "x", 3, 255).tolist() == [[0, 2, 1], [1, 0, 2]]


@pytest.mark.parametrize(("bits", "ids"), [(1, [0, 1, 1, 0]), (2, [0, 3, 2, 1]), (4, [0, 15, 7, 3])])
def test_grey_masks_of_few_bits_count_by_their_ids(bits, ids):
    """Pillow writes none of 2 or 4 bits, so this one is written by hand; it reads their ids spread over 0 to 255."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = int("".join(f"{each:0{bits}b}" for each in ids).ljust(16, "0"), 2).to_bytes(2, "big")[: -(-4 * bits // 8)]
    header = struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")
    assert decode_mask(b"\x89PNG\r\n\x1a\n" + b"".join(parts), "x", 16, 255).tolist() == [ids]


def test_a_file_that_changed_since_it_was_checked(tmp_path):
    root = write_folders(tmp_path, range(2))
    pairs = open_pairs(root, CLASSES, IGNORE)
    Image.new("RGB", (90, 90)).save(root / "images/a/1.jpg")
    pairs.read(0)
    with pytest.raises(InputError, match=r"of images/a/1 has changed since it was checked"):
        pairs.read(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "masks/a/1.png").unlink(), "1 of 3 images .* no mask, for example images/a/1.jpg"),
        (
            lambda root: (root / "masks/a/1.png").write_bytes(png(np.full((43, 51), 3, np.uint8))),
            "id 3, but .* 3 classes",
        ),
        (lambda root: (root / "masks/a/1.png").write_bytes(png(np.zeros((4, 5), np.uint8))), "51×43 .* mask 5×4"),
        (lambda root: (root / "masks/a/1.png").write_bytes(png(np.zeros((4, 5, 3), np.uint8))), "colours .RGB."),
        (lambda root: (root / "masks/a/1.png").write_bytes(b"\x89PNG"), "mask of images/a/1 cannot be used"),
        (lambda root: (root / "images/a/1.jpg").write_bytes(b"no image"), "images/a/1 is not an image"),
        (
            lambda root: (root / "images/a/1.png").write_bytes(png(np.zeros((4, 5, 3), np.uint8))),
            "two images for one mask",
        ),
        (
            lambda root: (root / "masks/a/1.PNG").write_bytes(png(np.zeros((43, 51), np.uint8))),
            r"two masks for one image: masks/a/1\.(png|PNG) and masks/a/1\.(png|PNG)",
        ),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, message):
    root = write_folders(tmp_path, range(3))
    change(root)
    with pytest.raises(InputError, match=message):
        open_pairs(root, CLASSES, IGNORE)


def test_nothing_there_and_a_split_that_is_none(tmp_path, scenes):
    for source, message in ((tmp_path / "no", "does not exist"), (tmp_path, "holds no images")):
        with pytest.raises(InputError, match=message):
            find_pairs(source)
    with pytest.raises(InputError, match="has no folder 'test'"):
        find_pairs(scenes[1], "test")
    with pytest.raises(InputError, match="no pixel of the 3 masks"):
        open_pairs(_void(tmp_path), CLASSES, 7, "val")


def _void(root):
    """Pairs whose pixels have no class."""
    (root / "val").mkdir()
    for number in range(3):
        Image.fromarray(np.zeros((4, 5, 3), np.uint8)).save(root / "val" / f"{number}.jpg")
        (root / "val" / f"{number}.png").write_bytes(png(np.full((4, 5), 7, np.uint8)))
    return root


def test_class_lists(tmp_path):
    many = tuple(f"class number {number}" for number in range(80))  # longer than a file's name may be
    assert class_list(",".join(many)) == many
    (tmp_path / "names.txt").write_text("a\nb c\n")
    assert class_list(str(tmp_path / "names.txt")) == ("a", "b c")
    assert class_list("a, b c,d") == ("a", "b c", "d")
    assert class_list("a b,") == ("a b",)
    wrong = {"a,b,a": "different names", "a,,": "different names", "": "no file", "a": "no file 'a'"}
    for given, message in wrong.items():
        with pytest.raises(InputError, match=message):
            class_list(given)


def test_formats_that_start_other_programs_are_refused(tmp_path):
    """PIL opens PostScript under any name, and runs Ghostscript to draw it."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (5, 4)).save(tmp_path / "images/a.jpg", format="EPS")
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/a.png").write_bytes(png(np.zeros((4, 5), np.uint8)))
    with pytest.raises(InputError, match="images/a is not an image of a known format"):
        open_pairs(tmp_path, CLASSES, IGNORE)


def test_a_tar_that_holds_a_name_twice_and_masks_of_no_image(tmp_path, caplog):
    tar = write_tar(tmp_path / "twice.tar", {"train": (1, 1)})
    with pytest.raises(InputError, match="twice.tar holds set/train/1.jpg twice"):
        find_pairs(tar)
    root = write_folders(tmp_path / "more", range(2))
    (root / "images/a/1.jpg").unlink()
    assert len(find_pairs(root)) == 1
    assert "1 masks of" in caplog.text and "belong to no image, for example a/1.png" in caplog.text


def test_image_and_mask_move_together_and_crops_follow_the_seed():
    ids = scene(4)[1].astype(np.int32)
    ids[ids == IGNORE] = 0
    image = Image.fromarray(COLOURS[ids].astype(np.uint8))
    crops = DenseCrops((24, 40), (0.5, 2.0), 0.5)
    sizes = np.array([ids.shape] * 40)
    views = crops.draw(5, 2, sizes)
    np.testing.assert_array_equal(views[7:9], crops.draw(5, 2, sizes)[7:9])
    assert (views != crops.draw(5, 3, sizes)).any() and 8 < (views[:, 0] < 0).sum() < 32
    scales = 40 / (np.abs(views[:, 0]) * 56)
    assert 0.5 <= scales.min() < 0.7 and 1.7 < scales.max() <= 2
    np.testing.assert_allclose(24 / (views[:, 4] * 40), scales)
    for view in views:
        pixels, mask = cut(image, ids, view, crops.size, (1, 2, 3))
        assert pixels.shape == (24, 40, 3) and mask.shape == (24, 40)
        outside = mask == NO_CLASS
        assert (pixels[outside] == (1, 2, 3)).all()
        near = np.abs(COLOURS[mask.clip(0)] - pixels).sum(-1) < 60
        assert near[~outside].mean() > 0.8  # all but the blurred borders


def test_a_view_of_the_whole_image_and_its_mirror_are_exact():
    image, ids = scene(6)
    whole = np.array([1, 0, 0, 0, 1, 0.0])
    pixels, mask = cut(Image.fromarray(image), ids.astype(np.int32), whole, ids.shape, (0, 0, 0))
    np.testing.assert_array_equal(pixels, image)
    np.testing.assert_array_equal(mask, ids)
    mirrored = cut(Image.fromarray(image), ids.astype(np.int32), np.array([-1, 0, 1, 0, 1, 0.0]), ids.shape, (0, 0, 0))
    np.testing.assert_array_equal(mirrored[0], image[:, ::-1])
    np.testing.assert_array_equal(mirrored[1], ids[:, ::-1])


def test_linked_folders_are_followed_and_loops_refused(tmp_path):
    write_folders(tmp_path / "far", (1, 2))
    root = tmp_path / "data"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
        (root / name / "b").symlink_to(tmp_path / "far" / name / "a")
    assert [pair.key for pair in find_pairs(root)] == ["images/b/1", "images/b/2"]
    (root / "images" / "c").symlink_to(root)
    with pytest.raises(InputError, match="images/c is a link to a folder that it lies in; remove the link"):
        find_pairs(root)
