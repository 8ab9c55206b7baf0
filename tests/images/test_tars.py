"""Tars: webdataset's samples and plain trees, and every way in which a tar can be wrong."""

import gzip
import io
import json
import tarfile

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from stl_offline.errors import InputError
from stl_offline.images.common import PassedOver
from stl_offline.images.sources import open_source, source_state
from stl_offline.images.tar_stream import read_samples


def pack(path, members, kind=tarfile.PAX_FORMAT):
    """Write (name, bytes) members in the order given."""
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(data)
            tar.addfile(info, None if data is None else io.BytesIO(data))
    return path


def listed(source):
    return [(image.key, source.class_names[image.class_id], image.data) for image in source]


def images(*names):
    return [(name, f"<{name}>".encode()) for name in names]


def test_a_tree_in_a_tar_has_the_folder_as_class(tmp_path):
    members = [("train", None), *images("train/n02/n02_1.JPEG", "train/n01/n01_7.JPEG", "train/n01/n01_10.JPEG")]
    source = open_source(pack(tmp_path / "x.tar", members))
    assert source.class_names == ("n01", "n02") and len(source) == 3
    assert listed(source) == [
        ("train/n01/n01_10", "n01", b"<train/n01/n01_10.JPEG>"),
        ("train/n01/n01_7", "n01", b"<train/n01/n01_7.JPEG>"),
        ("train/n02/n02_1", "n02", b"<train/n02/n02_1.JPEG>"),
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_keys_and_bytes_are_those_of_webdataset(kind, tmp_path):
    long = "deep/" * 18 + "name" if kind == tarfile.USTAR_FORMAT else "deep/" * 60 + "n" * 150
    members = []
    for number, stem in enumerate(("b/003", "a/001", "a/000", long)):
        members += [(f"{stem}.cls", str(number % 2).encode()), (f"{stem}.jpg", bytes([number]) * (700 * number + 1))]
    path = pack(tmp_path / "x.tar", members, kind)
    with open(path, "rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": "x.tar", "stream": stream}])))
    oracle = {sample["__key__"]: (sample["cls"].decode(), sample["jpg"]) for sample in samples}
    ours = {key: (name, data) for key, name, data in listed(open_source(path))}
    assert ours == oracle and list(ours) == sorted(oracle)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([("cls", b"7\n"), ("cls", b" 12 ")], ("7", "12")),
        ([("cls", b"tench"), ("cls", b"goldfish")], ("tench", "goldfish")),
        ([("json", b'{"label": 3}'), ("json", b'{"label": "x"}')], ("3", "x")),
        ([("json", b'{"label": 3, "class_name": "ant"}'), ("json", b'{"class_name": "bee"}')], ("ant", "bee")),
        ([("json", b'{"width": 3}'), ("json", b"[1]")], ("folder1", "folder2")),
    ],
)
def test_where_the_class_stands(labels, names, tmp_path):
    members = []
    for number, (extension, data) in enumerate(labels, 1):
        members += [*images(f"folder{number}/{number}.jpg"), (f"folder{number}/{number}.{extension}", data)]
    assert tuple(name for _, name, _ in listed(open_source(pack(tmp_path / "x.tar", members)))) == names


def test_a_cls_member_goes_before_json(tmp_path):
    members = [*images("1.jpg", "2.jpg"), ("1.cls", b"a"), ("1.json", json.dumps({"label": "no"}).encode())]
    members += [("2.json", json.dumps({"label": "no"}).encode()), ("2.cls", b"b")]
    assert open_source(pack(tmp_path / "x.tar", members)).class_names == ("a", "b")


def test_other_members_and_leading_dots_do_not_matter(tmp_path):
    members = [
        *images("./a/1.jpg", "./b/2.jpg", "./b/2.mask.png", "./a/._1.jpg", "./.cache/x/9.jpg"),
        ("./a/1.txt", b"a caption"),
        ("./a/readme", b""),
        (".", None),
    ]
    source = open_source(pack(tmp_path / "x.tar", members))
    assert [key for key, _, _ in listed(source)] == ["a/1", "b/2"]
    assert listed(source)[1][2] == b"<./b/2.jpg>"


def test_an_image_with_dots_in_its_name_is_used_when_alone(tmp_path):
    source = open_source(pack(tmp_path / "x.tar", images("a/one.v2.jpg", "b/two.jpg")))
    assert [key for key, _, _ in listed(source)] == ["a/one", "b/two"]


def test_many_tars_are_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        pack(tmp_path / f"s-{number:03d}.tar", images(f"b/{9 - number}.jpg", f"a/{number}.jpg"))
    whole = listed(open_source("s-{000..002}.tar"))
    assert [key for key, _, _ in whole] == ["a/0", "a/1", "a/2", "b/7", "b/8", "b/9"]
    for words in ("s-*.tar", "s-000.tar::s-002.tar::s-001.tar", str(tmp_path / "s-00{2,1,0}.tar")):
        assert listed(open_source(words)) == whole
    assert source_state("s-{000..002}.tar") == source_state("s-*.tar") != source_state("s-{000..001}.tar")


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz"])
def test_compressed_tars_are_read_too(name, tmp_path):
    plain = pack(tmp_path / "x.tar", images("b/2.jpg", "a/1.jpg"))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    assert listed(open_source(tmp_path / name)) == listed(open_source(plain))
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=f"{name} is no whole tar .*copy it again"):
        open_source(tmp_path / name)
    # What counts are the bytes, not the name.
    (tmp_path / name).write_bytes(plain.read_bytes())
    assert listed(open_source(tmp_path / name)) == listed(open_source(plain))


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "a/.."])
def test_hostile_names_are_refused(name, tmp_path):
    with pytest.raises(InputError, match=r"x\.tar: the member name .* points out of the tar"):
        open_source(pack(tmp_path / "x.tar", images("a/1.jpg", "b/1.jpg", name)))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_place_of_images_are_refused(kind, tmp_path):
    path = pack(tmp_path / "x.tar", images("a/1.jpg", "b/1.jpg"))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b/2.jpg")
        info.type, info.linkname = kind, "a/1.jpg"
        tar.addfile(info)
    with pytest.raises(InputError, match=r"b/2.jpg is a (link|pipe or device), not an image"):
        open_source(path)


def test_every_cut_of_a_tar_is_found(tmp_path):
    path = pack(tmp_path / "x.tar", [(f"{name}/1.jpg", name.encode() * 900) for name in "abc"], tarfile.USTAR_FORMAT)
    data = path.read_bytes()
    used = 3 * (512 + 1024)
    for length in [1, 511, 512, 700, 1535, 1536, 1537, 3072, 3072 + 512, used - 1, used, used + 511]:
        path.write_bytes(data[:length])
        with pytest.raises(InputError, match=r"x\.tar") as caught:
            open_source(path)
        assert "copy it again" in str(caught.value)
    path.write_bytes(data[: used + 512])  # one block of zeros ends a tar, as GNU tar has it
    assert len(open_source(path)) == 3


def test_damage_between_members_is_found(tmp_path):
    path = pack(tmp_path / "x.tar", [(f"{name}/1.jpg", name.encode() * 900) for name in "abc"], tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1536 + 5] ^= 1  # within the second member's name: its checksum no longer fits
    path.write_bytes(data)
    with pytest.raises(InputError, match="cut off or damaged after 1,536 bytes"):
        open_source(path)


def test_a_file_that_is_no_tar(tmp_path):
    for data in (b"", b"text" * 500):
        (tmp_path / "x.tar").write_bytes(data)
        with pytest.raises(InputError, match=r"x\.tar is no whole tar"):
            open_source(tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([], "is no whole tar|holds no images"),
        ([("a/notes.txt", b"")], "holds no images"),
        ([("a/1.cls", b"7")], "holds no images"),
        (images("1.jpg", "a/2.jpg"), "'1' lies beside the class folders and has no class"),
        (images("train/a/1.jpg", "val/a/2.jpg"), "the splits train, val, not only classes; make one tar per split"),
        (images("a/1.x.jpg", "a/1.y.jpg", "b/2.jpg"), r"the sample 'a/1' has 2 images \(a/1.x.jpg, a/1.y.jpg\)"),
        (images("a/1.jpg", "a/1.png", "b/2.jpg"), "the sample 'a/1' has 2 images"),
        ([*images("a/1.jpg", "b/2.jpg"), ("a/1.cls", b"4")], "1 of 2 samples have no class, for example 'b/2'"),
        ([*images("1.jpg", "2.jpg"), ("1.json", b"{")], "1.json cannot be read as a class"),
        ([*images("1.jpg", "2.jpg"), ("1.cls", b"\xff")], "1.cls cannot be read as a class"),
        ([*images("1.jpg", "2.jpg"), ("1.json", b'{"label": 1.5}')], "has the class 1.5"),
        ([*images("1.jpg", "2.jpg"), ("1.cls", b"  ")], "has the class ''"),
    ],
)
def test_tars_that_cannot_be_used(members, reason, tmp_path):
    with pytest.raises(InputError, match=reason) as caught:
        open_source(pack(tmp_path / "x.tar", members))
    assert "\n" not in str(caught.value)


def test_the_same_key_in_two_tars_is_refused(tmp_path):
    for number in range(2):
        pack(tmp_path / f"{number}.tar", images("a/1.jpg", "b/1.jpg", f"b/{number + 5}.jpg"))
    with pytest.raises(InputError, match=r"2 keys of .*1\.tar are in an earlier tar too, for example 'a/1'"):
        open_source(str(tmp_path / "{0,1}.tar"))


def test_samples_without_an_image_are_counted(tmp_path):
    """Their labels are passed over, and are no keys that two tars share."""
    for number in range(2):
        members = [*images(f"a/{number}.jpg"), ("lost.cls", b"a"), ("info.json", b"{}"), ("a/lost.json", b"{}")]
        pack(tmp_path / f"{number}.tar", sorted(members))
    source = open_source(str(tmp_path / "{0,1}.tar"))
    assert [image.key for image in source] == ["a/0", "a/1"]
    assert str(source.passed_over) == "4 .json (such as a/lost.json), 2 .cls (such as lost.cls)"
    streamed, passed_over = [], PassedOver()
    for number in range(2):
        streamed += [sample.key for sample in read_samples(str(tmp_path / f"{number}.tar"), passed_over)]
    assert streamed == ["a/0", "a/1"] and passed_over == source.passed_over


def test_a_tar_that_shrinks_while_it_is_read(tmp_path):
    path = pack(tmp_path / "x.tar", images("a/1.jpg", "b/1.jpg"))
    first, second = open_source(path)
    path.write_bytes(path.read_bytes()[:1540])
    assert first.data == b"<a/1.jpg>"
    with pytest.raises(InputError, match=r"ends within b/1.jpg"):
        _ = second.data
