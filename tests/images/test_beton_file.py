"""The .beton file: stock FFCV reads it, a stranger can, and damage does not pass unseen."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xxhash
from ffcv.reader import Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from PIL import Image

from stl_offline.errors import FormatError, InputError
from stl_offline.images import beton as beton_file
from stl_offline.images.beton import MIN_PAGE_SIZE, BetonWriter, open_beton
from stl_offline.images.encode import EncodedImage, content_hash, encode_image, key_hash
from stl_offline.images.pack import pack

COLOURS = np.random.default_rng(3).integers(0, 256, (9, 3))


def block(size, number=0, height=1):
    """An image of ``size`` bytes as far as the file is concerned."""
    data = np.random.default_rng(number).bytes(size)
    return EncodedImage("jpg", width=7 + number, height=height, data=data, content_hash=content_hash(data), as_is=True)


def write(path, images, *, keys=None, class_ids=None, class_names=("cat", "dog"), capacity=None, page=MIN_PAGE_SIZE):
    keys = [f"k/{number}" for number in range(len(images))] if keys is None else keys
    class_ids = [number % len(class_names) for number in range(len(images))] if class_ids is None else class_ids
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, len(images) if capacity is None else capacity, page)
        for key, class_id, image in zip(keys, class_ids, images, strict=True):
            writer.add(key, class_id, image)
        writer.finish(tuple(class_names), {"kind": "test"})
    return path


def by_struct(path):
    """Read a file with nothing but its description: records, index, table."""
    data = path.read_bytes()
    version, fields, page_size, samples, table = struct.unpack_from("<HHIQQ", data, 0)
    assert (version, fields) == (2, 4)
    descriptors = [struct.unpack_from("<B16s1024s", data, 24 + 1041 * number) for number in range(4)]
    assert [(kind, name.rstrip(b"\0")) for kind, name, _ in descriptors] == [
        (2, b"image"),
        (1, b"class_id"),
        (1, b"key_hash"),
        (1, b"content_hash"),
    ]
    magic, index_version, zero, offset, size, _, _ = struct.unpack_from("<8sIIQQQQ", descriptors[1][2])
    assert (magic, index_version, zero, offset + size) == (b"STLINDEX", 1, 0, table)
    start = 24 + 4 * 1041
    records = [struct.unpack_from("<BHHQ3xqqq", data, start + 40 * number) for number in range(samples)]
    index = json.loads(Zstd().decode(data[offset : offset + size]))
    entries = [struct.unpack_from("<QQQ", data, table + 24 * number) for number in range(samples)]
    assert len(data) == table + 24 * samples
    return data, page_size, records, index, entries


def test_a_stranger_reads_the_file_from_its_description(tmp_path):
    images = [block(900_000, number, height=3) for number in range(5)]
    data, page_size, records, index, entries = by_struct(write(tmp_path / "x.beton", images))
    assert index["keys"] == [f"k/{number}" for number in range(5)]
    assert index["class_names"] == ["cat", "dog"]
    for number, (image, record, entry) in enumerate(zip(images, records, entries, strict=True)):
        mode, width, height, pointer, class_id, key, content = record
        assert (mode, width, height, class_id) == (0, 7 + number, 3, number % 2)
        assert key % 2**64 == key_hash(f"k/{number}") and content % 2**64 == image.content_hash
        assert entry == (number, pointer, len(image.data))
        assert data[pointer : pointer + len(image.data)] == image.data
        assert pointer // page_size == (pointer + len(image.data) - 1) // page_size, "lies in two pages"
    assert len({pointer // page_size for _, pointer, _ in entries}) == 3  # two of these fit into 2 MiB


@pytest.mark.parametrize("sizes", [[MIN_PAGE_SIZE], [MIN_PAGE_SIZE, 1, MIN_PAGE_SIZE - 1, MIN_PAGE_SIZE]])
def test_pages_can_be_full_to_the_last_byte(sizes, tmp_path):
    images = [block(size, number) for number, size in enumerate(sizes)]
    beton = open_beton(write(tmp_path / "x.beton", images))
    assert [beton.stored_bytes(row) for row in range(len(beton))] == [image.data for image in images]


def test_stock_ffcv_reads_the_very_bytes(cats_and_dogs, tmp_path):
    files = sorted(cats_and_dogs.rglob("*.jpg"))
    images = [encode_image(file.read_bytes()) for file in files]
    path = write(tmp_path / "x.beton", images)
    reader = Reader(str(path))
    assert reader.field_names == ["image", "class_id", "key_hash", "content_hash"]
    data = path.read_bytes()
    sizes = dict(zip(reader.alloc_table["ptr"].tolist(), reader.alloc_table["size"].tolist(), strict=True))
    for file, record in zip(files, reader.metadata, strict=True):
        pointer = int(record["f0"]["data_ptr"])
        assert data[pointer : pointer + sizes[pointer]] == file.read_bytes()


@pytest.fixture(scope="module")
def stock(tmp_path_factory, photo, file_bytes):
    """Three files and what stock FFCV gives of each: JPEGs, pixels, and both in many sizes over several pages."""
    folder = tmp_path_factory.mktemp("stock")
    jpegs = [encode_image(file_bytes(photo(48, 72, seed=number))) for number in range(7)]
    pixels = [encode_image(file_bytes(photo(48, 72, seed=number), "PNG")) for number in range(7)]
    plain = []
    for row, colour in enumerate(COLOURS.tolist()):
        image = photo(30 + 5 * row, 90 - 4 * row)
        image.paste(tuple(colour), (0, 0, *image.size))
        data = file_bytes(image, "JPEG" if row % 2 else "PNG")
        plain.append(encode_image(data + bytes(1 << 20) if row % 2 else data))  # bytes after a JPEG's end fill pages
    arguments = []
    for name, images in (("jpegs", jpegs), ("pixels", pixels), ("plain", plain)):
        class_ids = [(3 * row + 1) % 2 for row in range(len(images))]
        path = write(folder / f"{name}.beton", images, class_ids=class_ids, capacity=20)
        arguments += [str(path), str(folder / f"{name}.npz")]
    script = str(Path(__file__).with_name("stock_loader.py"))
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("name", ["jpegs", "pixels", "plain"])
def test_stock_loader_gives_every_number(name, os_cache, stock):
    beton, read = open_beton(stock / f"{name}.beton"), np.load(stock / f"{name}.npz")
    assert read[f"class_id-{os_cache}"].ravel().tolist() == beton.class_ids.tolist()
    assert (read[f"key_hash-{os_cache}"].ravel().view(np.uint64) == beton.key_hashes).all()
    assert (read[f"content_hash-{os_cache}"].ravel().view(np.uint64) == beton.content_hashes).all()


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("name", ["jpegs", "pixels"])
def test_stock_loader_gives_the_pixels_that_reading_alone_gives(name, os_cache, stock):
    beton, read = open_beton(stock / f"{name}.beton"), np.load(stock / f"{name}.npz")
    images = read[f"image-{os_cache}"]
    assert images.shape == (7, 48, 72, 3)
    for row in range(7):
        assert (images[row] == beton.read_image(row)).all()


@pytest.mark.parametrize("os_cache", [True, False])
def test_stock_crops_of_images_of_many_sizes(os_cache, stock):
    # One colour each, so that any crop of any image must have it.
    beton, read = open_beton(stock / "plain.beton"), np.load(stock / "plain.npz")
    assert len(set((beton.pointers // MIN_PAGE_SIZE).tolist())) >= 3
    crops = read[f"image-{os_cache}"]
    assert crops.shape == (9, 12, 20, 3)
    assert np.abs(crops.astype(int) - COLOURS[:, None, None]).max() <= 3


# No control characters, nor halves of surrogate pairs.
names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


@settings(deadline=None, max_examples=25)
@given(
    keys=st.lists(names, min_size=1, max_size=8, unique=True),
    class_names=st.lists(names, min_size=2, max_size=5, unique=True),
    spare=st.integers(0, 300),
    data=st.data(),
)
def test_what_is_written_is_read(keys, class_names, spare, data, tmp_path_factory):
    images = [block(data.draw(st.integers(1, 99)), number) for number in range(len(keys))]
    class_ids = [data.draw(st.integers(0, len(class_names) - 1)) for _ in keys]
    path = tmp_path_factory.mktemp("beton") / "x.beton"
    capacity = len(keys) + spare
    beton = open_beton(write(path, images, keys=keys, class_ids=class_ids, class_names=class_names, capacity=capacity))
    assert (beton.keys, beton.class_names, len(beton)) == (keys, tuple(class_names), len(keys))
    assert beton.class_ids.tolist() == class_ids and beton.class_ids.dtype == np.int64
    assert beton.key_hashes.tolist() == [key_hash(key) for key in keys] and beton.key_hashes.dtype == np.uint64
    assert beton.content_hashes.tolist() == [image.content_hash for image in images]
    assert beton.widths.tolist() == [image.width for image in images]
    assert [beton.stored_bytes(row) for row in range(len(keys))] == [image.data for image in images]


def test_the_same_images_give_the_same_bytes(tmp_path):
    images = [block(500 + number, number) for number in range(4)]
    first = write(tmp_path / "a.beton", images).read_bytes()
    assert write(tmp_path / "b.beton", images).read_bytes() == first


def test_the_fingerprint_is_of_content_only(tmp_path):
    images = [block(50, number) for number in range(3)]

    def fingerprint(**changes):
        return open_beton(write(tmp_path / f"{len(changes)}.beton", **{"images": images, **changes})).fingerprint

    same = fingerprint()
    assert fingerprint(page=2 * MIN_PAGE_SIZE, capacity=9) == same
    different = {
        fingerprint(keys=["k/0", "k/1", "other"]),
        fingerprint(keys=["k/0", "k/", "1k/2"]),
        fingerprint(class_ids=[0, 1, 1]),
        fingerprint(class_names=("cat", "wolf")),
        fingerprint(class_names=("cat", "dog", "wolf"), class_ids=[0, 1, 0]),
        fingerprint(images=[*images[:2], block(50, 9)]),
    }
    assert len(different) == 6 and same not in different


def test_limits_of_the_writer(tmp_path):
    with pytest.raises(InputError, match="announced 1 images but gave more"):
        write(tmp_path / "x.beton", [block(9), block(9)], capacity=1)
    with pytest.raises(InputError, match=r"k/1: 2,097,153 bytes are more than a page .* `max_size`"):
        write(tmp_path / "x.beton", [block(9), block(MIN_PAGE_SIZE + 1)])
    for key in ("a\udcff", "a\x1b[2J", "k" * 4097):
        with pytest.raises(InputError, match="the key .*(is not UTF-8|control character|over 4,096)"):
            write(tmp_path / "x.beton", [block(9)], keys=[key])
    for page in (1 << 20, 3 << 20, 1 << 32):
        with pytest.raises(InputError, match="power of two"):
            write(tmp_path / "x.beton", [block(9)], page=page)


@pytest.fixture
def whole(tmp_path):
    return write(tmp_path / "whole.beton", [block(5000, number) for number in range(3)])


def test_files_that_are_no_beton(tmp_path, whole):
    with pytest.raises(InputError, match="there is no file"):
        open_beton(tmp_path / "missing.beton")
    other = tmp_path / "other.beton"
    for data in (b"", b"short", b"long enough to be one, but a text" * 200):
        other.write_bytes(data)
        with pytest.raises(FormatError, match=r"is no \.beton file"):
            open_beton(other)


def test_a_beton_of_another_writer_says_what_to_do(tmp_path, whole):
    data = bytearray(whole.read_bytes())
    start = data.index(b"STLINDEX")
    data[start : start + 48] = bytes(48)
    whole.write_bytes(data)
    Reader(str(whole))  # FFCV itself does not mind
    with pytest.raises(FormatError, match=r"not written by stl-offline.*stl-offline pack"):
        open_beton(whole)


def test_an_index_of_a_later_version_is_refused(whole):
    data = bytearray(whole.read_bytes())
    data[data.index(b"STLINDEX") + 8] = 2
    whole.write_bytes(data)
    with pytest.raises(FormatError, match="index of version 2, but this release reads version 1"):
        open_beton(whole)


def test_every_cut_is_found(whole):
    data = whole.read_bytes()
    for length in [0, 10, 100, 4000, 4188, 4200, MIN_PAGE_SIZE + 7, len(data) // 2, len(data) - 24, len(data) - 1]:
        whole.write_bytes(data[:length])
        with pytest.raises(FormatError):
            open_beton(whole)
    whole.write_bytes(data + b"\0")
    with pytest.raises(FormatError, match="cut off or damaged"):
        open_beton(whole)


@pytest.mark.parametrize("place", ["index", "metadata"])
def test_damaged_keys_and_numbers_are_found(place, whole):
    data, _, _, _, entries = by_struct(whole)
    damaged = bytearray(data)
    damaged[len(data) - 24 * len(entries) - 20 if place == "index" else 24 + 4 * 1041 + 20] ^= 1
    whole.write_bytes(damaged)
    with pytest.raises(FormatError, match="checksum"):
        open_beton(whole)


def test_an_image_damaged_after_packing_is_named(photo, file_bytes, tmp_path):
    path = write(tmp_path / "x.beton", [encode_image(file_bytes(photo(seed=n))) for n in range(2)], keys=["a", "b"])
    beton = open_beton(path)
    data = bytearray(path.read_bytes())
    end = int(beton.pointers[1] + beton.sizes[1])
    data[end - 300 : end] = bytes(300)
    path.write_bytes(data)
    assert beton.read_image(0).shape == (48, 72, 3)
    with pytest.raises(FormatError, match="the image 'b' is damaged"):
        beton.read_image(1)


def packed(tmp_path, photo, file_bytes):
    """JPEGs as they were, JPEGs that packing made, and pixels: three of each."""
    images = [encode_image(file_bytes(photo(60, 80, seed=n))) for n in range(3)]
    images += [encode_image(file_bytes(photo(200, 240, seed=n), "PNG")) for n in range(3)]
    images += [encode_image(file_bytes(photo(10, 12, seed=n), "PNG")) for n in range(3)]
    return write(tmp_path / "x.beton", images)


def test_every_changed_byte_of_every_image_is_found(photo, file_bytes, tmp_path):
    path = packed(tmp_path, photo, file_bytes)
    whole, beton, random = path.read_bytes(), open_beton(path), np.random.default_rng(0)
    assert beton.raw.tolist() == [False] * 6 + [True] * 3
    for row in range(9):
        assert beton.read_image(row).any()
        for place in random.integers(beton.pointers[row], beton.pointers[row] + beton.sizes[row], 20).tolist():
            data = bytearray(whole)
            data[place] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            with pytest.raises(FormatError, match=rf"the image 'k/{row}' is damaged: its bytes changed since packing"):
                open_beton(path).read_image(row)


def test_files_of_earlier_releases_open(photo, file_bytes, tmp_path):
    path = rewrite(packed(tmp_path, photo, file_bytes), lambda index: index.pop("converted"))
    beton = open_beton(path)
    assert beton.stored_hashes is None and all(beton.read_image(row).any() for row in range(9))


def rewrite(
    path, change_index=lambda index: None, change_records=lambda records: None, change_table=lambda table: None
):
    """The file with other content and the checksums that fit it, as a hostile writer makes it."""
    data, page_size, records, index, entries = by_struct(path)
    change_index(index)
    metadata = np.frombuffer(data, beton_file._METADATA_TYPE, len(records), beton_file._METADATA_START).copy()
    change_records(metadata)
    table = np.frombuffer(data, beton_file.ALLOC_TABLE_TYPE, len(entries), len(data) - 24 * len(entries)).copy()
    change_table(table)
    place = beton_file._index_place(path, data[: beton_file._METADATA_START]).copy()
    text = Zstd().encode(json.dumps(index).encode())
    place["size"], place["index_xxh3"] = len(text), xxhash.xxh3_64_intdigest(text)
    place["metadata_xxh3"] = xxhash.xxh3_64_intdigest(metadata.tobytes())
    offset = int(place["offset"])
    start = beton_file._header(len(records), page_size, offset + len(text)) + beton_file._field_descriptors(place)
    start += metadata.tobytes()
    path.write_bytes(start + data[len(start) : offset] + text + table.tobytes())
    return path


def put(field, value, row=1):
    def change(records):
        records[field][row] = value

    return change


def put_image(field, value, row=1):
    def change(records):
        records["f0"][field][row] = value

    return change


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"change_index": lambda index: index.pop("keys")}, "cannot be read .KeyError"),
        ({"change_index": lambda index: index["keys"].pop()}, "2 keys for 3 images"),
        ({"change_index": lambda index: index["keys"].__setitem__(0, 7)}, "is no text"),
        ({"change_index": lambda index: index["keys"].__setitem__(0, "k/1")}, "a key stands twice"),
        ({"change_index": lambda index: index["keys"].__setitem__(0, "\ud800")}, "cannot be read .UnicodeEncodeError"),
        ({"change_index": lambda index: index.update(keys="abc")}, "is no text"),
        ({"change_index": lambda index: index.update(class_names=["cat", "cat"])}, "a class name stands twice"),
        ({"change_index": lambda index: index.update(class_names=["cat"])}, "class id is out of range"),
        ({"change_index": lambda index: index.update(source=None)}, "is no text"),
        ({"change_index": lambda index: index["source"].update(max_size="48")}, "max_size is no number of pixels"),
        ({"change_index": lambda index: index.update(converted={"rows": [9], "xxh3": [1]})}, "IndexError"),
        ({"change_index": lambda index: index.update(converted={"rows": [1], "xxh3": [-1]})}, "OverflowError"),
        ({"change_index": lambda index: index["source"].update(more=" " * (1 << 27))}, "claims an impossible size"),
        ({"change_records": put("f1", -1)}, "class id is out of range"),
        ({"change_records": put("f1", 2)}, "class id is out of range"),
        ({"change_records": put_image("height", 0)}, "has no pixels"),
        ({"change_records": put_image("mode", 5)}, "unknown kind"),
        ({"change_records": put_image("mode", 1)}, "another number of pixels"),
        ({"change_records": put_image("data_ptr", 2**63)}, "table of places differ"),
        ({"change_records": put_image("data_ptr", 2**63), "change_table": put("ptr", 2**63)}, "outside of its page"),
        ({"change_records": put_image("data_ptr", 30), "change_table": put("ptr", 30)}, "outside of its page"),
        ({"change_table": put("size", 2**40)}, "outside of its page"),
        ({"change_table": put("size", 0)}, "outside of its page"),
        ({"change_table": put("sample_id", 0)}, "table of places differ"),
    ],
)
def test_files_that_contradict_themselves(changes, reason, whole):
    with pytest.raises(FormatError, match=f"is damaged: .*{reason}"):
        open_beton(rewrite(whole, **changes))


def test_random_damage_is_a_format_error_or_harmless(photo, file_bytes, tmp_path):
    path = packed(tmp_path, photo, file_bytes)
    data, random = path.read_bytes(), np.random.default_rng(1)
    expected = [open_beton(path).read_image(row) for row in range(9)]
    beton = open_beton(path)
    # The pages hold most bytes, and zeros between them that nothing reads.
    last = int(beton.pointers[-1] + beton.sizes[-1])
    places = np.concatenate([np.arange(4700), np.arange(int(beton.pointers[0]), last), np.arange(last, len(data))])
    ranges = [
        np.arange(0, 60),
        np.arange(1060, 1200),
        np.arange(4188, 4600),
        places,
        np.arange(len(data) - 800, len(data)),
    ]
    for number in range(400):
        bad = bytearray(data)
        for place in random.choice(ranges[number % len(ranges)], random.integers(1, 4)).tolist():
            bad[place] = int(random.integers(256))
        path.write_bytes(bad if number % 4 else bad[: int(random.integers(len(bad)))])
        try:
            beton = open_beton(path)
            images = [beton.read_image(row) for row in range(9)]
        except FormatError:
            continue
        assert all((image == other).all() for image, other in zip(images, expected, strict=True))


def test_an_image_that_does_not_fit_into_memory(tmp_path, monkeypatch):
    Image.new("RGB", (20, 12)).save(tmp_path / "a.jpg")
    beton = open_beton(pack(tmp_path, tmp_path / "a.beton").path)

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("stl_offline.images.beton.decode_jpeg", full)
    with pytest.raises(InputError, match="has 20 × 12 pixels, which do not fit into memory"):
        beton.read_image(0)
