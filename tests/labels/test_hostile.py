"""Files made to do harm: refused by name, before they fill the memory, and never unpickled."""

import ast
import dataclasses
import gzip
import io
import json
import pickle
import re
import struct
import tarfile
import tracemalloc
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numcodecs import Zstd

import stl_offline.labels
from stl_offline.errors import FormatError
from stl_offline.files import canonical_json
from stl_offline.labels.format import containers, tar_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS, ENCODINGS
from tests.labels.synthetic import make_arrays, make_spec, write_set

SPEC = make_spec(samples=5)


@contextmanager
def at_most(megabytes):
    """Fails where Python and numpy take more memory than that."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
    finally:
        tracemalloc.stop()


def zip_of(entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


@pytest.fixture
def entries():
    with zipfile.ZipFile(io.BytesIO(containers.encode_shard(make_arrays(SPEC), SPEC))) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def changed(entries, name, **changes):
    return entries | {name: json.dumps(json.loads(entries[name]) | changes).encode()}


def refuse_zip(entries, words, spec=SPEC):
    with at_most(8), pytest.raises(FormatError, match=words):
        containers.decode_shard(zip_of(entries), spec)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "logits/../../x", "logits/c/0/0/0/0/..", "x.pkl"])
def test_zip_entries_with_foreign_names(entries, name):
    refuse_zip(entries | {name: b"root"}, f"an entry that is no label's: '{name}'")


def test_a_zip_whose_entries_overlap():
    """The bomb without compression: many entries of the directory lead to the same bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("logits/c/0/0/0/0/0", b"x" * 2_000_000)
        info = archive.infolist()[0]
        for index in range(1000):
            copy = zipfile.ZipInfo(f"logits/c/{index + 1}/0/0/0/0")
            for field in ("header_offset", "file_size", "compress_size", "CRC"):
                setattr(copy, field, getattr(info, field))
            archive.filelist.append(copy)
            archive.NameToInfo[copy.filename] = copy
        archive._didModify = True
    with at_most(20), pytest.raises(FormatError, match="entries overlap"):
        containers.decode_shard(stream.getvalue(), SPEC)


def test_keys_that_unpack_to_gigabytes(entries):
    bomb = Zstd(level=1).encode(bytes(1 << 27))
    refuse_zip(entries | {"keys/c/0": bomb}, "impossible size")
    # A frame that only says so, and one that does not say.
    refuse_zip(entries | {"keys/c/0": b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 60) + bytes(20)}, "impossible")
    refuse_zip(entries | {"keys/c/0": b"\x28\xb5\x2f\xfd\x00\x58" + bytes(20)}, "impossible")
    # Four billion strings in four bytes.
    refuse_zip(entries | {"keys/c/0": Zstd().encode(struct.pack("<I", 0xFFFFFFFF))}, "another size")


def test_chunks_that_unpack_to_gigabytes(entries):
    chunk = bytearray(entries["logits/c/0/0/0/0/0"])
    struct.pack_into("<I", chunk, 4, 0x7FFFFFFF)
    refuse_zip(entries | {"logits/c/0/0/0/0/0": bytes(chunk)}, "another size")


@pytest.mark.parametrize("chunks", [[0, 1, 3, 5, 4], [10**9, 1, 3, 5, 4], [1.5, 1, 3, 5, 4], [-5, 1, 3, 5, 4], [5]])
def test_chunks_of_impossible_shapes(entries, chunks):
    grid = {"name": "regular", "configuration": {"chunk_shape": chunks}}
    refuse_zip(changed(entries, "logits/zarr.json", chunk_grid=grid), "shard")


@pytest.mark.parametrize("data", [b"[]", b"null", b"[" * 100_000, b"\xff", b'{"attributes": []}', b"{"])
@pytest.mark.parametrize("name", ["zarr.json", "keys/zarr.json", "logits/zarr.json"])
def test_metadata_that_is_no_metadata(entries, name, data):
    refuse_zip(entries | {name: data}, "shard")


@pytest.mark.parametrize("codec", ["numcodecs.pickle", "numcodecs.json2", "gzip", "sharding_indexed", "zstd"])
def test_codecs_of_others_are_never_run(entries, codec):
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": codec, "configuration": {}}]
    refuse_zip(changed(entries, "logits/zarr.json", codecs=codecs), "as no label set is")


def huge_spec(container, encoding="f16"):
    """The shard and the manifest agree on gigabytes."""
    return make_spec(samples=5, grid=(30_000, 30_000), container=container, encoding=encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_shapes_that_would_fill_the_memory(entries, encoding):
    spec = huge_spec("zarr", encoding)
    attributes = json.loads(entries["zarr.json"])["attributes"] | {"encoding": encoding}
    refuse_zip(changed(entries, "zarr.json", attributes=attributes), "claims 5 samples in .* bytes", spec)
    tar = containers.encode_shard(make_arrays(SPEC), make_spec(samples=5, container="webdataset", encoding=encoding))
    with at_most(8), pytest.raises(FormatError, match="claims 5 samples in .* bytes"):
        containers.decode_shard(tar, huge_spec("webdataset", encoding))


def test_a_manifest_that_claims_more_samples_than_bytes(tmp_path):
    write_set(tmp_path, SPEC, 1)
    entries = json.loads((tmp_path / "manifest.json").read_bytes())
    entries["shards"][0]["samples"] = entries["source"]["samples"] = 10**15
    (tmp_path / "manifest.json").write_bytes(canonical_json(entries))
    with at_most(8), pytest.raises(FormatError, match=r"holds 5 samples, the manifest says 1000000000000000"):
        open_label_set(tmp_path).read_shard(0)
    entries["shards"][0]["bytes"] = 10**15
    (tmp_path / "manifest.json").write_bytes(canonical_json(entries))
    with pytest.raises(FormatError, match="the manifest says 1000000000000000"):
        open_label_set(tmp_path).read_index(0)


# Tars.

TAR_SPEC = dataclasses.replace(SPEC, container="webdataset")


def tar_of(change, format=tarfile.GNU_FORMAT):
    """A shard whose third member's header, content or both are changed; ``change(member, data)`` gives both."""
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(containers.encode_shard(make_arrays(SPEC), TAR_SPEC))) as archive,
        tarfile.open(fileobj=stream, mode="w", format=format) as copy,
    ):
        for index, member in enumerate(archive.getmembers()):
            data = archive.extractfile(member).read()
            if index == 2:
                member, data = change(member, data)
            copy.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def refuse_tar(data, words):
    for read in (containers.decode_shard, containers.read_shard_index):
        with at_most(8), pytest.raises(FormatError, match=words):
            read(data, TAR_SPEC)


def test_extended_headers_are_refused():
    def change(member, data):
        member.pax_headers = {"comment": "x" * 100_000, "size": str(10**15)}
        return member, data

    refuse_tar(tar_of(change, tarfile.PAX_FORMAT), "shard")

    def sparse(member, data):
        member.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**15)}
        return member, b"1\n0\n1\n".ljust(512, b"\0") + data

    refuse_tar(tar_of(sparse, tarfile.PAX_FORMAT), "shard")


def test_a_sparse_member_is_refused():
    def change(member, data):
        member.type = tarfile.GNUTYPE_SPARSE
        return member, data

    refuse_tar(tar_of(change), "shard")


@pytest.mark.parametrize(
    "kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE]
)
def test_links_and_devices_are_refused(kind):
    def change(member, data):
        member.type, member.linkname, member.size = kind, "../../etc/passwd", 0
        return member, b""

    refuse_tar(tar_of(change), "no label")


def test_a_record_that_unpacks_to_gigabytes():
    bomb = gzip.compress(gzip.decompress(tar_member(2)) + bytes(1 << 26))

    def change(member, data):
        member.size = len(bomb)
        return member, bomb

    refuse_tar(tar_of(change), "larger than any")


def tar_member(index):
    with tarfile.open(fileobj=io.BytesIO(containers.encode_shard(make_arrays(SPEC), TAR_SPEC))) as archive:
        return archive.extractfile(archive.getmembers()[index]).read()


@pytest.mark.parametrize("length", [b"|S999999", b"|S000000", b"|S-1", b"|S99999999999"])
def test_a_record_that_lies_of_its_length(length):
    lying = tar_shard._gzip(re.sub(rb"\|S\d+", length, gzip.decompress(tar_member(2)), count=1))

    def change(member, data):
        assert lying != data
        member.size = len(lying)
        return member, lying

    refuse_tar(tar_of(change), "shard")


@pytest.mark.parametrize("container", CONTAINERS)
def test_keys_that_are_no_text(container, entries):
    spec = dataclasses.replace(SPEC, container=container)
    if container == "zarr":
        keys = Zstd().decode(entries["keys/c/0"]).replace("größe".encode(), b"gr\xff\xfe\xfd\xfc\xfb")
        data = zip_of(entries | {"keys/c/0": Zstd().encode(keys)})
    else:
        stream = tar_shard._gzip(gzip.decompress(tar_member(2)).replace("größe".encode(), b"gr\xff\xfe\xfd\xfc\xfb"))

        def change(member, data):
            member.size = len(stream)
            return member, stream

        data = tar_of(change)
    for read in (containers.decode_shard, containers.read_shard_index):
        with pytest.raises(FormatError, match="shard"):
            read(data, spec)


# Pickles.


class Grenade:
    thrown = False

    def __reduce__(self):
        return (Grenade.throw, ())

    @staticmethod
    def throw():
        Grenade.thrown = True


def test_nothing_is_ever_unpickled(entries):
    stream = io.BytesIO()
    np.save(stream, np.array([Grenade()], dtype=object), allow_pickle=True)
    shell = pickle.dumps(Grenade())
    attempts = [zip_of(entries | {"keys/c/0": data}) for data in (stream.getvalue(), shell, Zstd().encode(shell))]
    attempts += [zip_of(entries | {"logits/c/0/0/0/0/0": shell}), stream.getvalue(), shell]
    for data in attempts:
        with pytest.raises(FormatError):
            containers.decode_shard(data, SPEC)
    for content in (stream.getvalue(), shell):

        def change(member, data, content=content):
            member.size = len(tar_shard._gzip(content))
            return member, tar_shard._gzip(content)

        refuse_tar(tar_of(change), "shard")
    assert not Grenade.thrown


def test_no_way_leads_to_pickle():
    """In the source: nobody imports it, and numpy is told everywhere not to use it."""
    for path in Path(stl_offline.labels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {"pickle", "dill", "marshal", "shelve", "joblib"} & {name.split(".")[0] for name in names}
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "np.lib.format.read_array"):
                assert any(word.arg == "allow_pickle" and word.value.value is False for word in node.keywords), path
