"""Tars that are read once from first to last: packed from web servers, with bounded memory, hostile or cut off."""

import bz2
import gzip
import io
import lzma
import tarfile
import tracemalloc

import numpy as np
import pytest

from stl_offline import remote
from stl_offline.errors import InputError
from stl_offline.images import beton as beton_module
from stl_offline.images import tar_stream
from stl_offline.images.beton import open_beton
from stl_offline.images.common import PassedOver
from stl_offline.images.pack import ensure_beton, pack
from stl_offline.images.sources import open_source
from stl_offline.images.tar_stream import read_samples
from tests.images.test_tars import images, listed
from tests.images.test_tars import pack as write_tar
from tests.web_files import WebFiles, running


@pytest.fixture
def served(tmp_path, photo, file_bytes):
    """A folder with three tars of images of two classes, in no order; one image is a PNG."""
    root = tmp_path / "served"
    root.mkdir()
    names = [f"{('cat', 'dog')[number % 2]}/{37 * number % 101:03d}" for number in range(17)]
    for tar, part in enumerate((names[:3], names[3:4], names[4:])):
        members = []
        for name in part:
            kind = ("JPEG", "PNG")[name == names[5]]
            image = photo(40 + len(members), 70 - len(members), seed=len(members) + 100 * tar)
            members.append((f"{name}.{kind.lower()}", file_bytes(image, kind)))
        write_tar(root / f"{tar}.tar", members)
    return root


@pytest.mark.parametrize("ranges", [True, False])
def test_pack_reads_each_tar_once(served, tmp_path, ranges, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    pack(f"{served}/{{0..2}}.tar", tmp_path / "local.beton")
    with running(WebFiles(served, ranges=ranges)) as server:
        spec = f"{server.url}/{{0..2}}.tar?key=secret"
        report = pack(spec, tmp_path / "web.beton")
        gets = [path for method, path, _ in server.asked if method == "GET"]
        assert gets == [f"/{number}.tar?key=secret" for number in range(3)]
        beton = ensure_beton(spec)
        # A signature that changes is no other image; another file is.
        assert ensure_beton(spec.replace("secret", "other")).path == beton.path
        (served / "0.tar").write_bytes((served / "0.tar").read_bytes())
        assert ensure_beton(spec).path != beton.path
        assert "secret" not in beton.place
    local, ours = open_beton(tmp_path / "local.beton"), open_beton(tmp_path / "web.beton")
    assert report.samples == 17 and report.classes == 2 and report.converted == 1
    assert sorted(ours.keys) == local.keys and ours.class_names == local.class_names
    assert ours.keys == [name.rpartition(".")[0] for tar in range(3) for name in members_of(served / f"{tar}.tar")]
    for row, key in enumerate(local.keys):
        mine = ours.keys.index(key)
        assert ours.stored_bytes(mine) == local.stored_bytes(row)
        for name in ("class_ids", "content_hashes", "heights", "widths", "raw"):
            assert getattr(ours, name)[mine] == getattr(local, name)[row]


def members_of(path):
    with tarfile.open(path) as tar:
        return tar.getnames()


def test_a_number_of_images_that_is_not_known_gives_the_same_file(tmp_path, photo, file_bytes, monkeypatch):
    """Sorted tars on a web server and on this machine are packed into the same bytes, moved pages included."""
    data = file_bytes(photo(9, 7))
    members = [(f"{('cat', 'dog')[n // 900]}/{n:04d}.jpg", data + bytes([n % 256, n // 256])) for n in range(1800)]
    write_tar(tmp_path / "a.tar", members)
    # With fewer rows for a start, their metadata need another page in the end.
    monkeypatch.setattr(beton_module, "_FIRST_CAPACITY", 3)
    monkeypatch.setattr(beton_module, "MIN_PAGE_SIZE", 1 << 15)
    pack(tmp_path / "a.tar", tmp_path / "local.beton", page_size=1 << 15)
    with running(WebFiles(tmp_path, ranges=True)) as server:
        pack(f"{server.url}/a.tar", tmp_path / "web.beton", page_size=1 << 15)
    assert (tmp_path / "web.beton").read_bytes() == (tmp_path / "local.beton").read_bytes()
    assert open_beton(tmp_path / "web.beton").pointers[0] == 3 << 15


def streamed(path):
    return [(one.key, one.image.read()) for one in read_samples(str(path), PassedOver())]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_streams_hold_what_the_whole_tar_holds(tmp_path, kind, compress):
    long = "deep/" * 18 + "name" if kind == tarfile.USTAR_FORMAT else "deep/" * 60 + "n" * 150
    members = [(f"a/{long}{number}.jpg", bytes([number]) * (number * 511)) for number in range(5)]
    members.insert(2, ("a/other.bin", bytes(5000)))
    write_tar(tmp_path / "x.tar", members, kind)
    write_tar(tmp_path / "y.tar", images(f"a/{long.rpartition('/')[0]}/y.jpg"), kind)
    joined = (tmp_path / "x.tar").read_bytes() + (tmp_path / "y.tar").read_bytes()
    (tmp_path / "z.tar").write_bytes(compress(joined))
    expected = [(key, data) for key, _, data in listed(open_source(tmp_path / "z.tar"))]
    assert sorted(streamed(tmp_path / "z.tar")) == expected and len(expected) == 6


@pytest.mark.parametrize("end", [0, 100, 511, 512, 1000, 1024, 1535])
def test_a_stream_that_is_cut_off_is_refused_as_a_file_is(tmp_path, end):
    path = write_tar(tmp_path / "x.tar", [("a/0.jpg", bytes(700)), ("a/1.jpg", b"x" * 20)])
    path.write_bytes(path.read_bytes()[: 1536 + end])
    for read in (streamed, open_source):
        with pytest.raises(InputError, match=r"x.tar is (no whole tar|cut off)") as found:
            read(path)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda info: setattr(info, "type", tarfile.SYMTYPE), "is a link, not an image"),
        (lambda info: setattr(info, "type", tarfile.FIFOTYPE), "is a pipe or device"),
        (lambda info: setattr(info, "name", "/etc/x.jpg"), "points out of the tar"),
        (lambda info: setattr(info, "size", 1 << 40), "is no whole tar"),
    ],
)
def test_hostile_members(tmp_path, make, words):
    info = tarfile.TarInfo("a/x.jpg")
    info.linkname = "y.jpg"
    make(info)
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match=f"x.tar.*{words}"):
        streamed(tmp_path / "x.tar")


def test_a_header_of_gigabytes(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    (tmp_path / "x.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(InputError, match=r"x.tar is no whole tar \(a header claims to be 8,589,934,592 bytes"):
        streamed(tmp_path / "x.tar")


def test_a_sample_of_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_stream, "_MOST_MEMBERS", 3)
    path = write_tar(tmp_path / "x.tar", [(f"a/x.{number}.jpg", b"x") for number in range(4)])
    with pytest.raises(InputError, match="x.tar: the sample 'a/x' has too many members"):
        streamed(path)


def test_memory_does_not_grow_with_the_tar(tmp_path):
    """200 MB of a file that is no image, and 100 MB of images, one after another."""
    path = tmp_path / "x.tar"
    with open(path, "wb") as stream:
        for name, size in (("big.bin", 200 << 20), *((f"a/{number}.jpg", 1 << 20) for number in range(100))):
            info = tarfile.TarInfo(name)
            info.size = size
            stream.write(info.tobuf())
            stream.seek(size, io.SEEK_CUR)
        stream.write(bytes(1024))
    tracemalloc.start()
    count = sum(1 for _ in read_samples(str(path), PassedOver()))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 100 and most < 16 << 20


def test_addresses_in_messages_hold_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    with running(WebFiles(tmp_path, ranges=True)) as server:
        url = server.url.replace("http://", "http://user:word@") + "/no.tar?key=secret"
        with pytest.raises(InputError, match="there is no file http://127.0.0.1:.*/no.tar$"):
            pack(url, tmp_path / "x.beton")
    with pytest.raises(InputError, match=r"cannot read http://127.0.0.1:\d+/no.tar \(4 tries\)") as found:
        pack(url, tmp_path / "x.beton")
    assert "secret" not in str(found.value) and "word" not in str(found.value)


def test_a_server_that_fails_is_asked_again_and_one_that_refuses_is_not(tmp_path, monkeypatch):
    """fsspec says of every failure that there is no such file."""
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.01)
    (tmp_path / "a.tar").write_bytes(bytes(1234))
    with running(WebFiles(tmp_path, ranges=True)) as server:
        place = f"{server.url}/a.tar"
        server.fails = [503, 503]
        assert remote.remote_size(place) == 1234
        server.fails = 64 * [500]
        with pytest.raises(InputError, match=r"cannot look at .*a.tar \(4 tries\): .*500.*; try again later"):
            remote.remote_size(place)
        server.fails = 64 * [403]
        with pytest.raises(InputError, match=r"cannot look at .*a.tar: .*403.*; check the credentials"):
            remote.remote_size(place)
        server.fails = []
        with pytest.raises(InputError, match="there is no file"):
            remote.remote_size(f"{server.url}/b.tar")


def test_patterns(monkeypatch):
    with pytest.raises(InputError, match="is not on this machine, and here its images are needed in any order"):
        open_source("s3://bucket/{00..03}.tar")
    assert np.all([remote.is_address(url) for url in ("s3://b/x", "hf://datasets/a/b", "https://x")])
    with pytest.raises(InputError, match="there is nothing at /nowhere.tar|there is no tar /nowhere.tar"):
        open_source("file:///nowhere.tar")
