"""Data sets as they are found: what is no image, no class, no tar, or not what its name says."""

import bz2
import gzip
import io
import lzma
import os
import socket
import tarfile

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from stl_offline.errors import InputError
from stl_offline.images.beton import open_beton
from stl_offline.images.classes import UNLABELLED, read_class_map
from stl_offline.images.encode import encode_image
from stl_offline.images.pack import pack, pack_sample
from stl_offline.images.sources import open_source, source_state
from stl_offline.pixels import ImageError

JPEG = b"\xff\xd8\xff and so on"


def names(source):
    return [(image.key, source.class_names[image.class_id]) for image in source]


def tar(path, members, **options):
    with tarfile.open(path, "w", **options) as stream:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            stream.addfile(info, io.BytesIO(data))
    return path


def members(*paths):
    return [(path, JPEG) for path in paths]


# Which files are images


def test_images_without_an_image_extension_are_found_by_their_first_bytes(make_tree, photo, file_bytes, tmp_path):
    jpeg, png = file_bytes(photo(9, 9)), file_bytes(photo(9, 9), "PNG")
    taken = {"cat/1.heic": jpeg, "cat/2.jpg_large": jpeg, "cat/3": png, "dog/4.jpg:orig": jpeg}
    passed = {"cat/5.heic": b"\0\0\0\x18ftypheic", "cat/6.heic": b"", "dog/7.nef": b"II*\0", "dog/8.jpg~": jpeg}
    root = make_tree(tmp_path / "x", {**taken, **passed, "dog/9.bak": jpeg, "dog/10": b"text"})
    report = pack(root, tmp_path / "x.beton")
    assert open_beton(report.path).keys == sorted(taken)
    assert report.passed_over.counts == {".heic": 2, ".nef": 1, ".jpg~": 1, ".bak": 1, "without extension": 1}
    assert str(report.passed_over).startswith("2 .heic (such as cat/")


def test_the_same_files_are_found_in_a_tar(tmp_path):
    path = tar(tmp_path / "x.tar", [*members("a/1.heic", "b/2", "b/3.jpg"), ("a/4.heic", b"x"), ("b/3.npy", JPEG)])
    source = open_source(path)
    assert names(source) == [("a/1", "a"), ("b/2", "b"), ("b/3", "b")]
    assert source.passed_over.counts == {".heic": 1, ".npy": 1}


def test_what_file_managers_leave_is_no_image_and_no_class(make_tree, tmp_path):
    junk = "@eaDir/1.jpg .thumbnails/1.jpg __MACOSX/cat/._1.jpg cat/._1.jpg cat/@eaDir/1.jpg cat/.x/1.jpg cat/Thumbs.db"
    files = dict.fromkeys(["cat/1.jpg", "dog/1.jpg", *junk.split()], JPEG)
    source = open_source(make_tree(tmp_path / "x", files))
    assert names(source) == [("cat/1.jpg", "cat"), ("dog/1.jpg", "dog")] and len(source.passed_over) == 0
    packed = open_source(tar(tmp_path / "x.tar", files.items()))
    assert names(packed) == [("cat/1", "cat"), ("dog/1", "dog")] and len(packed.passed_over) == 0


@pytest.fixture
def odd_files(cats_and_dogs, tmp_path):
    """The pets with a pipe, a socket, a device, a folder and a dangling link that are called as images."""
    cat = cats_and_dogs / "cat"
    os.mkfifo(cat / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(cat, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/socket.jpg")
        os.close(folder)
    (cat / "device.jpg").symlink_to("/dev/zero")
    (cat / "folder.jpg").mkdir()
    (cat / "link.jpg").symlink_to(".git/annex/objects/nothing")
    return cats_and_dogs


def test_only_regular_files_are_read(odd_files, tmp_path):
    report = pack(odd_files, tmp_path / "x.beton", skip_broken=True)
    assert report.samples == 6
    reasons = {key.split("/")[1]: reason for key, reason in report.skipped}
    assert reasons == {
        "device.jpg": "is a device, not a regular file",
        "folder.jpg": "is a folder, not an image file",
        "link.jpg": "is a link to .git/annex/objects/nothing, which does not exist "
        "(with git-annex or DVC, get the file first)",
        "pipe.jpg": "is a named pipe, not a regular file",
        "socket.jpg": "is a socket, not a regular file",
    }
    assert len(source_state(odd_files)) == 32
    assert pack_sample(odd_files, 99, tmp_path, skip_broken=True)[0].keys == open_beton(report.path).keys
    with pytest.raises(ImageError, match=r"device.jpg' of .*not a regular file; repair or remove it, or .*skip_broken"):
        pack(odd_files, tmp_path / "y.beton")


def test_a_file_that_becomes_a_pipe_does_not_hang(cats_and_dogs):
    source = open_source(cats_and_dogs)
    (cats_and_dogs / "cat/cat-0.jpg").unlink()
    os.mkfifo(cats_and_dogs / "cat/cat-0.jpg")
    with pytest.raises(ImageError, match="is a named pipe"):
        _ = next(iter(source)).data


@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_jpeg_over_pillows_limit_can_be_shrunk(mode, file_bytes, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = file_bytes(Image.new(mode, (100, 50), 128))
    with pytest.raises(ImageError, match="100 × 50 pixels") as caught:
        encode_image(data)
    assert caught.value.advice == "shrink such images with `max_size`"
    assert (encode_image(data, max_size=10).width, encode_image(data, max_size=10).height) == (10, 5)


# Classes


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("train/a/1.jpg", "val/b/1.jpg"), r"holds the splits train, val in place of classes; .*x/train"),
        (("train2017/1.jpg", "val2017/1.jpg"), "the splits train2017, val2017"),
        (("Training/a/1.jpg", "test_set/b/1.jpg", "dev/1.jpg"), "the splits"),
        (("train/a/1.jpg", "train/b/1.jpg"), "the splits train in place of classes"),
        (("a/train/1.jpg", "a/val/2.jpg", "b/train/3.jpg"), "the classes of .* hold the splits train, val"),
    ],
)
def test_splits_are_no_classes(paths, reason, make_tree, tmp_path):
    with pytest.raises(InputError, match=reason):
        open_source(make_tree(tmp_path / "x", dict.fromkeys(paths, JPEG)))
    if "in place of classes" not in reason or "val" in reason:
        with pytest.raises(InputError, match="the splits"):
            open_source(tar(tmp_path / "x.tar", members(*paths)))


def test_classes_that_are_called_as_splits_beside_others_stay(make_tree, tmp_path):
    root = make_tree(tmp_path / "x", dict.fromkeys(("train/1.jpg", "bus/1.jpg", "test/2.jpg"), JPEG))
    assert open_source(root).class_names == ("bus", "test", "train")
    root = make_tree(tmp_path / "y", dict.fromkeys(("train/1.jpg", "test/2.jpg"), JPEG))
    assert open_source(root, ["test", "train"]).class_names == ("test", "train")


@pytest.mark.parametrize("prefix", ["", "data/", "data/train/"])
def test_a_tree_has_the_same_classes_in_a_folder_and_in_a_tar(prefix, make_tree, tmp_path):
    paths = ("dog/1.jpg", "dog/old/2.jpg", "cat/a/b/3.jpg")
    folder = names(open_source(make_tree(tmp_path / "x", dict.fromkeys(paths, JPEG))))
    packed = names(open_source(tar(tmp_path / "x.tar", members(*(prefix + path for path in paths)))))
    assert [(prefix + key.removesuffix(".jpg"), name) for key, name in folder] == packed


def test_one_class_and_no_class_can_be_packed_but_not_trained_on(cats_and_dogs, tmp_path):
    flat = open_beton(pack(cats_and_dogs / "cat", tmp_path / "flat.beton").path)
    assert flat.class_names == (UNLABELLED,) and flat.keys == ["cat-0.jpg", "cat-1.jpg", "cat-2.jpg"]
    with pytest.raises(InputError, match=r"has only one class \('unlabelled'\); training takes two"):
        flat.require_classes()
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "dog").symlink_to(cats_and_dogs / "dog")
    assert open_beton(pack(tmp_path / "one", tmp_path / "one.beton").path).class_names == ("dog",)
    assert open_source(tar(tmp_path / "x.tar", members("1.jpg", "2.jpg"))).class_names == (UNLABELLED,)
    assert open_source(tar(tmp_path / "x.tar", members("train/1.jpg"))).class_names == (UNLABELLED,)


@pytest.mark.parametrize(
    "text", ["0 tench\r\n2 crane bird\r\n1 goldfish\r\n", "\ufeff0\ttench\n1\tgoldfish\n\n2\tcrane bird"]
)
def test_a_class_map_names_numbers_and_is_the_class_list(text, tmp_path):
    (tmp_path / "map.txt").write_bytes(text.encode())
    (tmp_path / "map.json").write_text('["tench", "goldfish", "crane bird"]')
    expected = {"0": "tench", "1": "goldfish", "2": "crane bird"}
    found = read_class_map(tmp_path / "map.txt")
    assert found == read_class_map(tmp_path / "map.json") == expected and list(found) == ["0", "1", "2"]
    path = tar(tmp_path / "x.tar", [*members("a.jpg", "b.jpg"), ("a.cls", b"2"), ("b.cls", b"0\n")])
    source = open_source(path, class_map=found)
    assert source.class_names == ("tench", "goldfish", "crane bird")
    assert names(source) == [("a", "crane bird"), ("b", "tench")]
    listed = open_source(path, ["crane bird", "tench"], found)
    assert [image.class_id for image in listed] == [0, 1]
    with pytest.raises(InputError, match="has the class '2', which the class map lacks"):
        open_source(path, class_map={"0": "tench", "1": "goldfish"})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"0 a\n1 a\n", "names 'a' twice .classes 0 and 1"),
        (b"0 a\n0 b\n", "has the class 0 twice"),
        (b"tench\n", "has the line 'tench'"),
        (b"[1, 2]", "no text"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe0\0", "not UTF-8"),
        (b"0 a\n", "at least two names"),
    ],
)
def test_class_maps_that_cannot_be_used(data, reason, tmp_path):
    (tmp_path / "map").write_bytes(data)
    with pytest.raises(InputError, match=reason):
        read_class_map(tmp_path / "map")


# Tars


def test_names_are_split_as_webdataset_splits_them(tmp_path):
    content = [("part0/x0.v2.jpg", JPEG), ("part0/x0.v2.cls", b"7"), ("part0/x1.JPG", JPEG), ("part0/x1.CLS", b"8")]
    content += [("a.b/x2.jpg", JPEG), ("a.b/x2.coarse.cls", b"1"), ("a.b/x2.cls", b"9"), ("__meta__/x3.jpg", JPEG)]
    path = tar(tmp_path / "x.tar", content)
    with open(path, "rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": "x.tar", "stream": stream}])))
    oracle = {sample["__key__"]: (sample.get("v2.cls") or sample["cls"]).decode() for sample in samples}
    assert dict(names(open_source(path))) == oracle == {"part0/x0": "7", "part0/x1": "8", "a.b/x2": "9"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (["x.left.jpg", "x.right.jpg"], "the sample 'x' has 2 images .*first dot"),
        (["x.jpg", "x.jpg"], "holds x.jpg twice"),
        (["x.jpg", "x.JPG"], "holds x.jpg and x.JPG, which are one name"),
        (["x.jpg", "x.v2.cls"], r"x.v2.cls is no class of the image x.jpg: .* name it x.cls"),
        (["x.v2.jpg", "x.v3.cls"], r"x.v3.cls is no class of the image x.v2.jpg: .* name it x.v2.cls"),
        (["k" * 5000 + ".jpg"], "is 5,000 bytes long, over 4,096"),
        (["k\x1b.jpg", "k\x9b.jpg"], r"'k.x1b' holds a control character; rename it; 1 more member names cannot"),
        (["k\udcff.jpg"], r"'k.udcff' is not UTF-8"),
    ],
)
def test_names_that_can_be_read_in_two_ways_are_refused(content, reason, tmp_path):
    with pytest.raises(InputError, match=reason):
        open_source(tar(tmp_path / "x.tar", [*members(*content), *members("a/1.jpg", "b/1.jpg")]))


def test_tars_joined_by_cat_are_read_whole(tmp_path):
    first, second = tar(tmp_path / "a.tar", members("a/1.jpg")), tar(tmp_path / "b.tar", members("b/2.jpg"))
    both = tmp_path / "c.tar"
    both.write_bytes(first.read_bytes() + bytes(512 * 7) + second.read_bytes() + bytes(100))
    assert names(open_source(both)) == [("a/1", "a"), ("b/2", "b")]
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(first.read_bytes()) + gzip.compress(second.read_bytes()))
    assert names(open_source(tmp_path / "c.tar.gz")) == names(open_source(both))
    both.write_bytes(first.read_bytes() + b"something else" * 99)
    with pytest.raises(InputError, match=r"c\.tar"):
        open_source(both)
    both.write_bytes(first.read_bytes() * 2)
    with pytest.raises(InputError, match=r"holds a/1.jpg twice"):
        open_source(both)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_seen_in_the_bytes(compress, tmp_path):
    plain = tar(tmp_path / "plain.tar", members("a/1.jpg", "b/2.jpg"))
    (tmp_path / "x.tar").write_bytes(compress(plain.read_bytes()))
    assert names(open_source(tmp_path / "x.tar")) == names(open_source(plain))
    (tmp_path / "x.tar").write_bytes(compress(plain.read_bytes())[:-20])
    with pytest.raises(InputError, match="is no whole tar"):
        open_source(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (b"\x28\xb5\x2f\xfd", "compressed with zstd; decompress it first"),
        (b"PK\x03\x04", "is a zip archive; unpack it"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
    ],
)
def test_other_files_called_tar_are_named(head, reason, tmp_path):
    (tmp_path / "x.tar").write_bytes(head + bytes(600))
    with pytest.raises(InputError, match=reason):
        open_source(tmp_path / "x.tar")


def header(name, kind=tarfile.REGTYPE, size_field=None, size=0):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size_field is not None:
        block[124:136] = size_field
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "size_field",
    [
        b"\xff" * 12,
        b"\xff" * 10 + b"\xfe\x00",
        b"\x80" + b"\x7f" * 11,
        b"\x80\0\0\0\0\0\0\x10\0\0\0\0",
        b"-0000001000\0",
    ],
)
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE])
def test_sizes_that_no_member_can_have(kind, size_field, tmp_path):
    whole = tar(tmp_path / "whole.tar", members("a/1.jpg", "b/2.jpg")).read_bytes()
    (tmp_path / "x.tar").write_bytes(header("c/3.jpg", kind, size_field) + whole)
    with pytest.raises(InputError, match=r"x\.tar"):
        open_source(tmp_path / "x.tar")


def test_a_sparse_map_without_end_does_not_hang(tmp_path):
    info = tarfile.TarInfo("c/3.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
    info.size = 512
    block = info.tobuf(tarfile.PAX_FORMAT) + b"99999999\n".ljust(512, b"1")
    (tmp_path / "x.tar").write_bytes(block)
    with pytest.raises(InputError, match=r"x\.tar"):
        open_source(tmp_path / "x.tar")


def test_sparse_members_are_named(tmp_path):
    path = tar(tmp_path / "x.tar", members("a/1.jpg", "b/2.jpg"))
    path.write_bytes(header("c/3.jpg", tarfile.GNUTYPE_SPARSE) + path.read_bytes())
    with pytest.raises(InputError, match="c/3.jpg is stored as a sparse file; make the tar without --sparse"):
        open_source(path)


def test_damaged_tars_never_end_in_another_error(tmp_path):
    random = np.random.default_rng(5)
    kinds = [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]
    content = [*members("a/1.jpg", "b/2.jpg", "b/" + "n" * 200 + ".jpg"), ("a/1.json", b"{}")]
    wholes = [tar(tmp_path / "whole.tar", content, format=kind).read_bytes() for kind in kinds]
    for number in range(300):
        data = bytearray(wholes[number % 2])
        for place in random.integers(0, len(data) * 3 // 4, random.integers(1, 4)).tolist():
            data[place] = int(random.integers(256))
        (tmp_path / "x.tar").write_bytes(data[: int(random.integers(1, len(data)))] if number % 3 == 0 else data)
        try:
            for image in open_source(tmp_path / "x.tar"):
                _ = image.data
        except InputError:
            continue


# Names of sources


def test_literal_names_go_before_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run[1]", "run1", "run{a,b}", "star*"):
        (tmp_path / folder).mkdir()
        for number in range(2):
            tar(tmp_path / folder / f"t-{number}.tar", members(f"{folder}x/{number}.jpg", f"y/{number}.jpg"))
    for folder in ("run[1]", "run{a,b}", "star*", str(tmp_path / "run[1]")):
        expected = [f"{folder.rpartition('/')[2]}x/0", f"{folder.rpartition('/')[2]}x/1", "y/0", "y/1"]
        for pattern in ("t-{0..1}.tar", "t-*.tar", "t-[01].tar", "t-0.tar::FOLDER/t-1.tar"):
            source = open_source(f"{folder}/{pattern.replace('FOLDER', folder)}")
            assert sorted(key for key, _ in names(source)) == sorted(expected)
    assert len(open_source("run[0-9]/t-0.tar")) == 2
    assert len(open_source("{run1,star*}/t-{0,1}.tar".replace("star*", "run1").replace("{run1,run1}", "run[0-9]"))) == 4
    (tmp_path / "run1" / "odd[2].tar").write_bytes((tmp_path / "run1" / "t-0.tar").read_bytes())
    assert len(open_source("run1/odd[2].tar")) == 2
