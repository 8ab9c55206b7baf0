"""Lengths that a shard claims are compared with the real ones before a codec reads its bytes."""

import io
import json
import struct
import tarfile
import tracemalloc
import zipfile

import numpy as np
import pytest
from numcodecs import Blosc, Zstd

from stl_offline.errors import FormatError
from stl_offline.labels.format import decode_shard, encode_shard, read_shard_index, tar_shard
from stl_offline.labels.format.zarr_chunks import read_array
from tests.labels.format.test_containers import to_zip, zip_entries
from tests.labels.synthetic import make_arrays, make_spec

SPEC = make_spec(samples=300, grid=(8, 8))


@pytest.fixture(scope="module")
def entries():
    return zip_entries(encode_shard(make_arrays(SPEC), SPEC))


@pytest.fixture(scope="module")
def tar():
    spec = make_spec(container="webdataset")
    return spec, encode_shard(make_arrays(spec), spec)


def refuse(entries, words, spec=SPEC):
    data = to_zip(entries)
    for read in (decode_shard, read_shard_index):
        tracemalloc.start()
        try:
            with pytest.raises(FormatError, match=words):
                read(data, spec)
            assert tracemalloc.get_traced_memory()[1] < 1 << 26
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("name", ["content_hash", "class_id"])
@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (12, lambda real: real + 1, "its header claims"),
        (12, lambda real: real + 100_000, "its header claims"),
        (12, lambda real: 0xFFFF_FFFF, "its header claims"),
        (12, lambda real: real - 1, "its header claims"),
        (12, lambda real: 0, "its header claims"),
        (4, lambda real: real + 1, "another size"),
        (4, lambda real: 0xFFFF_FFFF, "another size"),
        (4, lambda real: 0, "another size"),
        (8, lambda real: 0, "blocks of 0 bytes"),
        (8, lambda real: real + 1, "blocks of"),
        (8, lambda real: 1, "blocks, which its size|as its content"),
        (16, lambda real: 0, "outside of it"),
        (16, lambda real: 0x7FFF_FFFF, "outside of it"),
        (16, lambda real: 0xFFFF_FFFF, "outside of it"),
    ],
)
def test_a_lying_blosc_header_is_refused_before_blosc_reads(entries, name, offset, value, words):
    # Values that repeat, so that blosc packs them and the table of blocks is there.
    dtype = np.dtype("<u8" if name == "content_hash" else "<u4")
    chunk = bytearray(Blosc("zstd", 5, Blosc.SHUFFLE).encode(np.zeros(300, dtype)))
    assert not chunk[2] & 2
    assert decode_shard(to_zip(entries | {f"{name}/c/0": bytes(chunk)}), SPEC)
    struct.pack_into("<I", chunk, offset, value(struct.unpack_from("<I", chunk, offset)[0]))
    refuse(entries | {f"{name}/c/0": bytes(chunk)}, words)


@pytest.mark.parametrize(("offset", "value"), [(0, 3), (1, 2), (2, 0x01), (2, 0x0B), (2, 0x93), (3, 4), (3, 0)])
def test_a_blosc_chunk_of_another_kind_is_refused(entries, offset, value):
    chunk = bytearray(Blosc("zstd", 5, Blosc.SHUFFLE).encode(np.zeros(300, "<u8")))
    chunk[offset] = value
    refuse(entries | {"content_hash/c/0": bytes(chunk)}, "not packed by|as no label set is|as large as its content")
    for cut in (b"", bytes(chunk[:15])):
        refuse(entries | {"content_hash/c/0": cut}, "less than a header")


def test_stored_chunks_are_read_and_their_lengths_compared():
    values = np.random.default_rng(0).integers(2**63, size=40).astype("<u8")
    chunk = Blosc("zstd", 0).encode(values)
    assert chunk[2] & 2
    np.testing.assert_array_equal(read_array("x", (40,), 40, values.dtype, {"x/c/0": chunk}, 0), values)
    claim = bytearray(chunk[:-8])
    struct.pack_into("<I", claim, 12, len(claim))
    with pytest.raises(FormatError, match="as large as its content"):
        read_array("x", (40,), 40, values.dtype, {"x/c/0": bytes(claim)}, 0)


def pack_keys(*words):
    return Zstd().encode(b"".join(struct.pack("<I", word) if isinstance(word, int) else word for word in words))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ((2, 1, b"a", 1, b"b"), None),
        ((3, 1, b"a", 1, b"b"), "another size"),
        ((2, 1, b"a", 2, b"b"), "longer than the chunk"),
        ((2, 1, b"a", 0xFFFF_FFFF, b"b"), "bytes, more than 65,536"),
        ((2, 1, b"a", 65_537, b"b" * 65_537), "bytes, more than 65,536"),
        ((2, 5, b"abcde", b"xy"), "ends within"),
        ((2, 1, b"a", 1, b"bc"), "more than its strings"),
    ],
)
def test_lengths_of_keys(words, match):
    entries = {"keys/c/0": pack_keys(*words)}
    if match is None:
        assert read_array("keys", (2,), 2, None, entries, 1 << 20).tolist() == ["a", "b"]
        return
    with pytest.raises(FormatError, match=match):
        read_array("keys", (2,), 2, None, entries, 1 << 20)


def changed(entries, name, **changes):
    path = f"{name}/zarr.json"
    return entries | {path: json.dumps(json.loads(entries[path]) | changes).encode()}


def codecs(entries, name, place, **changes):
    found = json.loads(entries[f"{name}/zarr.json"])["codecs"]
    found[place]["configuration"] = found[place].get("configuration", {}) | changes
    return changed(entries, name, codecs=found)


@pytest.mark.parametrize("name", ["content_hash", "views", "logits", "keys"])
def test_what_version_1_never_writes_is_refused(entries, name):
    """Once read by zarr, which checks no claimed size: 168 kB took 2.2 GB."""
    never = "stored as no label set is"
    refuse(changed(entries, name, storage_transformers=[{"name": "x", "configuration": {}}]), never)
    refuse(changed(entries, name, storage_transformers=None), never)
    refuse(changed(entries, name, fill_value=3), never)
    refuse(codecs(entries, name, 0, endian="big"), never)
    own = json.loads(entries[f"{name}/zarr.json"])["codecs"]
    for chain in ([], own[:1], own[1:], own[::-1], [*own, {"name": "crc32c"}], [own[0], own[1] | {"more": 1}]):
        refuse(changed(entries, name, codecs=chain), never)
    refuse(changed(entries, name, chunk_grid={"name": "regular"}), never)
    shape = json.loads(entries[f"{name}/zarr.json"])["shape"]
    for chunks in ([301, *shape[1:]], [0, *shape[1:]], [-1, *shape[1:]], [True, *shape[1:]], [3.0, *shape[1:]]):
        grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
        refuse(changed(entries, name, chunk_grid=grid), "impossible shape")
    if shape[1:]:
        grid = {"name": "regular", "configuration": {"chunk_shape": [shape[0], *[1] * len(shape[1:])]}}
        refuse(changed(entries, name, chunk_grid=grid), "impossible shape")
    refuse(changed(entries, name, shape=[float(shape[0]), *shape[1:]]), "shape|no count")
    refuse(changed(entries, name, zarr_format=2), "no array of zarr")


def test_entries_of_no_array_are_refused(entries):
    for path in ("more/zarr.json", "more/c/0", "class_id/c/1", "logits/c/0", "keys/c/0/0"):
        refuse(entries | {path: b"{}"}, "belongs to no array")


def test_a_palette_longer_than_its_images_is_refused():
    spec = make_spec(encoding="q8")
    entries = zip_entries(encode_shard(make_arrays(spec), spec))
    grid = {"name": "regular", "configuration": {"chunk_shape": [10**12]}}
    with pytest.raises(FormatError, match="entries, more than its images name"):
        decode_shard(to_zip(changed(entries, "palette", shape=[10**12], chunk_grid=grid)), spec)


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (8, 1, "encrypted"),
        (8, 8, "encrypted or has other flags"),
        (10, 8, "compressed"),
        (10, 99, "compressed"),
        (20, 0, "compressed|no whole zip"),
        (24, 0xFFF0, "overlap|compressed|no whole zip"),
    ],
)
def test_zip_directories_that_lie_are_refused(entries, offset, value, words):
    data = bytearray(to_zip(entries))
    directory = struct.unpack_from("<I", data, len(data) - 6)[0]
    assert data[directory : directory + 4] == b"PK\1\2"
    struct.pack_into("<H", data, directory + offset, value)
    with pytest.raises(FormatError, match=words):
        decode_shard(bytes(data), SPEC)


def test_zip_entries_that_share_bytes_are_refused(entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        big = max(archive.infolist(), key=lambda info: info.file_size)
        for index in range(1000):
            info = zipfile.ZipInfo(f"logits/c/{index + 10}/0/0/0/0")
            for part in ("file_size", "compress_size", "CRC", "header_offset"):
                setattr(info, part, getattr(big, part))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
        archive._didModify = True
    with pytest.raises(FormatError, match="overlap"):
        decode_shard(stream.getvalue(), SPEC)


def tar_header(data, at, **changes):
    info = tarfile.TarInfo.frombuf(data[at : at + 512], "utf-8", "strict")
    for name, value in changes.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


@pytest.mark.parametrize("size", [-1, -512, -(10**6), 10**6, 10**15, 2**62])
def test_a_tar_member_of_an_impossible_size_is_refused(tar, size):
    """Of a negative size some versions of tarfile read for ever."""
    spec, data = tar
    for at in (0, 1024):
        with pytest.raises(FormatError, match="more than follow it"):
            decode_shard(data[:at] + tar_header(data, at, size=size) + data[at + 512 :], spec)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE, tarfile.LNKTYPE, b"Z"])
def test_a_tar_member_of_another_kind_is_refused(tar, kind):
    spec, data = tar
    body = b"30 GNU.sparse.size=9999999999\n".ljust(512, b"\0")
    header = tar_header(data, 1024, type=kind, size=30)
    with pytest.raises(FormatError, match="no label"):
        decode_shard(data[:1024] + header + body + data[1024:], spec)


def test_what_follows_the_end_of_a_tar_is_refused(tar):
    spec, data = tar
    assert decode_shard(data + bytes(10240), spec)
    with pytest.raises(FormatError, match="follow its end"):
        decode_shard(data + data, spec)


def test_a_second_gzip_member_is_refused(tar):
    spec, data = tar
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        packed = archive.extractfile(archive.getnames()[1]).read()
    fields = tar_shard._fields(tar_shard.layout(spec, 12))
    assert tar_shard._read_record(packed, fields, 1 << 20)["class_id"] == 0
    for other in (packed + packed, packed + b"\0", packed[:-1]):
        with pytest.raises(FormatError, match="cut off"):
            tar_shard._read_record(other, fields, 1 << 20)


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_long_keys(container):
    spec = make_spec(samples=2, container=container)
    arrays = make_arrays(spec)
    arrays.keys[0] = "a/" + "ö" * 32_767
    assert decode_shard(encode_shard(arrays, spec), spec).equals(arrays)
    arrays.keys[0] += "."
    with pytest.raises(FormatError, match="more than 65,536 bytes"):
        encode_shard(arrays, spec)
