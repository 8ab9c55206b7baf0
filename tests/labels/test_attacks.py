"""Label sets of an attacker, against every command that reads one: an answer in one line, soon, in little memory.

Each attack changes a whole label set, with checksums that fit. Every command is called, since each is a way in.
"""

import contextlib
import dataclasses
import io
import json
import os
import socket
import struct
import tarfile
import time
import tracemalloc
import zipfile

import pytest
from numcodecs import Zstd

from stl_offline.errors import FormatError, StlError
from stl_offline.files import canonical_json, sha256_bytes
from stl_offline.labels.convert import convert
from stl_offline.labels.format import containers, tar_shard
from stl_offline.labels.join import join
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.stats import measure
from stl_offline.labels.suspects import find_suspects
from stl_offline.labels.transfer import pull, push
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_spec, write_set
from tests.labels.test_rules import read_cache, read_preview

SAMPLES = 6


def spec_of(container="zarr", **settings):
    return make_spec(samples=SAMPLES, container=container, **settings)


def read_verify(labels, out):
    faults = verify(labels, workers=1).faults
    if faults:
        raise FormatError(faults[0])


def read_merged(labels, out):
    """With a sound set of other images."""
    spec = dataclasses.replace(labels.spec, source=spec_of().source)
    with LabelSetWriter(out / "other", spec, 1) as writer:
        writer.write_shard(0, make_arrays(spec, 100_000, 100_000 + SAMPLES))
        writer.finish()
    merge([labels, open_label_set(out / "other")], out / "merged", workers=1)


def read_join(labels, out):
    arrays = make_arrays(spec_of())
    join(labels, arrays.keys[:1], arrays.content_hash[:1], labels.spec.class_names, match="content")


READERS = {
    "verify": read_verify,
    "convert": lambda labels, out: convert(labels, out / "converted", encoding="q8", workers=1),
    "copy": lambda labels, out: convert(labels, out / "copied", workers=1),
    "merge": read_merged,
    "stats": lambda labels, out: measure(labels, workers=1),
    "suspects": lambda labels, out: find_suspects(labels, 1, workers=1),
    "preview": read_preview,
    "values": lambda labels, out: list(labels.values()),
    "key": lambda labels, out: labels.get("no such key"),
    "keys": lambda labels, out: list(labels),
    "join": read_join,
    "cache": read_cache,
}
# These copy bytes, and do not look into shards.
COPIES = {
    "push": lambda labels, out: push(labels, out / "pushed", workers=1),
    "pull": lambda labels, out: pull(labels, out / "pulled", workers=1),
}


def replace_shard(folder, data, index=0):
    """Another shard, with the checksum and the size that fit."""
    entries = json.loads((folder / "manifest.json").read_bytes())
    record = entries["shards"][index]
    (folder / record["name"]).write_bytes(data)
    record |= {"bytes": len(data), "sha256": sha256_bytes(data)}
    (folder / "manifest.json").write_bytes(canonical_json(entries))


def shard_path(folder):
    return next(path for path in sorted(folder.iterdir()) if path.name.startswith("labels-00000"))


@contextlib.contextmanager
def harmless(megabytes=40, seconds=10):
    """Fails where Python and numpy take more memory than that, or the processor more time."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 1e6
        assert time.process_time() - started < seconds
    finally:
        tracemalloc.stop()


# Zips.


def with_entries(change):
    def attack(folder):
        with zipfile.ZipFile(shard_path(folder)) as archive:
            entries = {info.filename: archive.read(info) for info in archive.infolist()}
        change(entries)
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        replace_shard(folder, stream.getvalue())

    return attack


def extended(name, **others):
    """Metadata with further entries."""

    def change(entries):
        entries[name] = json.dumps(json.loads(entries[name]) | others).encode()

    return with_entries(change)


def replaced(name, change):
    def attack(entries):
        entries[name] = change(entries[name])

    return with_entries(attack)


def zip64_sizes(folder):
    """The size of the first entry, in the field for sizes beyond 4 GB, is 2^62 bytes."""
    data = shard_path(folder).read_bytes()
    size, offset = struct.unpack_from("<II", data, len(data) - 10)
    table = bytearray(data[offset : offset + size])
    struct.pack_into("<II", table, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    length = struct.unpack_from("<H", table, 28)[0]
    struct.pack_into("<H", table, 30, 20)
    table[46 + length : 46 + length] = struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 99, 99, len(table), offset, 0)
    replace_shard(folder, data[:offset] + bytes(table) + end)


def zip64_end(folder):
    """The table of entries lies 2^50 bytes further on, and holds 2^40 entries."""
    data = shard_path(folder).read_bytes()
    end = len(data) - 22
    size, offset = struct.unpack_from("<II", data, end + 12)
    far = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 1 << 40, 1 << 40, size, offset + (1 << 50))
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, end, 1)
    last = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    replace_shard(folder, data[:end] + far + locator + last)


def local_name(folder):
    """The header before an entry's bytes names another entry than the table."""
    data = bytearray(shard_path(folder).read_bytes())
    data[data.find(b"class_id/c/0")] ^= 1
    replace_shard(folder, bytes(data))


def short_frame(frame):
    """A zstd frame whose header claims a millionth of its content."""
    data = bytearray(Zstd(1).encode(bytes(1 << 26)))
    data[6:10] = (100).to_bytes(4, "little")
    return bytes(data)


# Tars.


def with_members(change, kind=tarfile.GNU_FORMAT):
    def attack(folder):
        with tarfile.open(shard_path(folder)) as archive:
            members = [(info, archive.extractfile(info).read()) for info in archive.getmembers()]
        members = change(members) or members
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=kind) as archive:
            for info, data in members:
                archive.addfile(info, io.BytesIO(data))
        replace_shard(folder, stream.getvalue())

    return attack


def info_set(**fields):
    def change(members):
        for name, value in fields.items():
            setattr(members[2][0], name, value)

    return change


def block(name, kind, size):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def long_keys(folder):
    """Keys of 60,000 bytes that pack to a hundred, in a set of many images: 40 times the file in memory, and more."""
    count = 4000
    spec = make_spec(samples=count, container="webdataset", grid=(1, 1), top_k=1)
    one = dataclasses.replace(make_arrays(spec, 0, 1), keys=["a." + "b" * 60_000])
    shard = containers.encode_shard(one, dataclasses.replace(spec, source={"samples": 1, "fingerprint": "x"}))
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        head, label = (archive.extractfile(info).read() for info in archive.getmembers())
    stream = io.BytesIO()
    tar_shard._add(stream, "__labels__", json.dumps(json.loads(head) | {"samples": count}).encode())
    for number in range(count):
        tar_shard._add(stream, f"{number:06d}.labels.npy.gz", label)
    data = stream.getvalue() + bytes(1024)
    for path in folder.iterdir():
        path.unlink()
    name = "labels-00000-of-00001.tar"
    record = {"name": name, "first": 0, "samples": count, "bytes": len(data), "sha256": sha256_bytes(data)}
    (folder / name).write_bytes(data)
    (folder / "manifest.json").write_bytes(canonical_json({**spec.to_json(), "shards": [record]}))


FLOOD = [{}] * 3_000_000
INSIDE = {
    "zip: absolute name": ("zarr", with_entries(lambda entries: entries.update({"/etc/passwd": b"x"})), "no label's"),
    "zip: name with ..": ("zarr", with_entries(lambda entries: entries.update({"../../x": b"x"})), "no label's"),
    "zip: long name": ("zarr", with_entries(lambda entries: entries.update({"A" * 65_000: b"x"})), "no label's"),
    "zip: many digits": (
        "zarr",
        with_entries(lambda entries: entries.update({"logits/c/" + "9" * 60_000: b"x"})),
        "belongs to no array",
    ),
    "zip: other local name": ("zarr", local_name, "no whole zip"),
    "zip: zip64 sizes": ("zarr", zip64_sizes, "overlap"),
    "zip: zip64 end": ("zarr", zip64_end, "no whole zip"),
    "metadata: flood in an array's": ("zarr", extended("logits/zarr.json", x=FLOOD), "bytes, more than 16,384"),
    "metadata: flood in the group's": ("zarr", extended("zarr.json", x=FLOOD), "bytes, more than 16,384"),
    "metadata: long codec": ("zarr", extended("logits/zarr.json", codecs=["x" * 10_000]), "as no label set is"),
    "metadata: long type": ("zarr", extended("logits/zarr.json", data_type="f" * 10_000), "expected float16"),
    "metadata: many axes": ("zarr", extended("logits/zarr.json", shape=[1] * 3000), "expected float16"),
    "metadata: digits": ("zarr", extended("keys/zarr.json", shape=[10**4000]), "shard"),
    "zstd: second frame": (
        "zarr",
        replaced("keys/c/0", lambda data: data + Zstd(1).encode(bytes(1 << 26))),
        "destination buffer too small",
    ),
    "zstd: skippable frame": (
        "zarr",
        replaced("keys/c/0", lambda data: struct.pack("<II", 0x184D2A50, 0x7FFFFFFF) + data),
        "impossible size",
    ),
    "zstd: less than there is": ("zarr", replaced("keys/c/0", short_frame), "shard"),
    "tar: pax header of a huge size": (
        "webdataset",
        with_members(info_set(pax_headers={"size": str(10**18), "comment": "x" * 1_000_000}), tarfile.PAX_FORMAT),
        "no label",
    ),
    "tar: sparse": ("webdataset", with_members(info_set(type=tarfile.GNUTYPE_SPARSE)), "no label"),
    "tar: link": (
        "webdataset",
        with_members(info_set(type=tarfile.LNKTYPE, linkname="/etc/passwd")),
        "no label|more than follow",
    ),
    "tar: name with ..": ("webdataset", with_members(info_set(name="../../x.labels.npy.gz")), "not named after"),
    "tar: name with control characters": (
        "webdataset",
        with_members(info_set(name="\x1b[2J\n.labels.npy.gz")),
        "not named after",
    ),
    "tar: member twice": ("webdataset", with_members(lambda members: [*members, members[-1]]), "has 4|holds 3"),
    "tar: long names": (
        "webdataset",
        lambda folder: replace_shard(
            folder, (block("L", b"L", 190_000) + bytes(190_464)) * 20 + shard_path(folder).read_bytes()
        ),
        "no label",
    ),
    "tar: long keys": ("webdataset", long_keys, "the shard's keys are larger than any packed to its size"),
}


@pytest.mark.parametrize("attack", INSIDE)
def test_shards_of_an_attacker(tmp_path, attack):
    container, change, words = INSIDE[attack]
    write_set(tmp_path / "set", spec_of(container), 2)
    change(tmp_path / "set")
    for name, read in READERS.items():
        (tmp_path / name).mkdir()
        # Keys may unpack to 30 times the file.
        with harmless(200 if attack == "tar: long keys" else 40), pytest.raises(FormatError, match=words) as refusal:
            read(open_label_set(tmp_path / "set"), tmp_path / name)
        assert len(str(refusal.value)) < 5000 and str(refusal.value).isprintable(), name


# Files.


def bind(path):
    """A socket; its address may have a hundred bytes, so it is named from its own folder."""
    before = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


KINDS = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": bind,
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["manifest.json", "partial.json", "shard"])
def test_files_that_are_no_files(tmp_path, name, kind):
    write_set(tmp_path / "set", spec_of(), 2)
    path = shard_path(tmp_path / "set") if name == "shard" else tmp_path / "set" / name
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    for reader, read in (READERS | COPIES).items():
        (tmp_path / reader).mkdir()
        with harmless(), pytest.raises(FormatError, match=path.name):
            read(open_label_set(tmp_path / "set"), tmp_path / reader)


@pytest.mark.parametrize(
    "name", [".partial/lock", ".partial/pull.lock", ".partial/job.json", "labels-00000-of-00002.zarr.zip"]
)
@pytest.mark.parametrize("job", ["convert", "pull"])
def test_no_job_writes_into_a_hard_link(tmp_path, job, name):
    """Archives can hold hard links: the content of the other name is somebody else's."""
    write_set(tmp_path / "set", spec_of(), 2)
    (tmp_path / "precious").write_bytes(b"precious" * 200)
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    os.link(tmp_path / "precious", tmp_path / "out" / name)
    labels = open_label_set(tmp_path / "set")
    with contextlib.suppress(StlError):
        convert(labels, tmp_path / "out", encoding="q8") if job == "convert" else pull(labels, tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious" * 200


# Settings.

LONG = "x" * 2_000_000
SETTINGS = {
    "creation": ({"creation": {"x": LONG}}, "creation cannot be written as JSON: more than 1,048,576 bytes"),
    "licence": ({"labeler": {"architecture": "a", "weights_sha256": "0", "licence": LONG}}, "labeler cannot be"),
    "class name": ({"class_names": [LONG, *"bcdefg"]}, "class names must be a list of names in Unicode, each of 1 to"),
    "architecture": ({"labeler": {"architecture": ["a"], "weights_sha256": "0", "licence": ""}}, "labeler.*text"),
    "weights": ({"labeler": {"architecture": "a", "weights_sha256": 7, "licence": ""}}, "labeler.*text"),
    "fingerprint": ({"source": {"samples": SAMPLES, "fingerprint": [1]}}, "source.*text"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_an_attacker(tmp_path, name):
    write_set(tmp_path, spec_of(), 2)
    changes, words = SETTINGS[name]
    entries = json.loads((tmp_path / "manifest.json").read_bytes()) | changes
    (tmp_path / "manifest.json").write_bytes(canonical_json(entries))
    with harmless(), pytest.raises(FormatError, match=words) as refusal:
        open_label_set(tmp_path)
    assert len(str(refusal.value)) < 5000


# A key in two shards.


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_a_key_in_two_shards_is_refused_by_every_reader(tmp_path, container):
    spec = spec_of(container)
    whole = make_arrays(spec)
    with LabelSetWriter(tmp_path / "set", spec, 3) as writer:
        for index in range(3):
            first, last = writer.shard_range(index)
            arrays = make_arrays(spec, first, last)
            if index == 2:
                arrays = dataclasses.replace(arrays, keys=[arrays.keys[0], whole.keys[1]])
            writer.write_shard(index, arrays)
        writer.finish()
    for name, read in READERS.items():
        (tmp_path / name).mkdir()
        with pytest.raises(StlError, match=r"twice.*labels-00000-of-00003.*") as refusal:
            read(open_label_set(tmp_path / "set"), tmp_path / name)
        assert whole.keys[1] in str(refusal.value) and "labels-00002-of-00003" in str(refusal.value), name
    assert not (tmp_path / "convert" / "converted" / "manifest.json").exists()


def test_only_shards_that_are_read_are_compared(tmp_path):
    spec = spec_of()
    with LabelSetWriter(tmp_path, spec, 3) as writer:
        for index in range(3):
            keys = [f"{index}/a", "twice" if index else f"{index}/b"]
            writer.write_shard(index, dataclasses.replace(make_arrays(spec, *writer.shard_range(index)), keys=keys))
        writer.finish()
    labels = open_label_set(tmp_path)
    assert measure(labels, shards=2).shards == 2  # 0 and 1
    with pytest.raises(FormatError, match="holds 1 keys twice"):
        labels.check_unique([2])
