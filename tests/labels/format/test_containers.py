"""The contract of every container: bytes and back, the same bytes each time, and nothing damaged gets through."""

import dataclasses
import io
import json
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError
from stl_offline.labels.format import containers
from stl_offline.labels.format.q8 import from_q8, to_q8
from stl_offline.labels.spec import CONTAINERS, ENCODINGS
from tests.labels.synthetic import make_arrays, make_spec

every_container = pytest.mark.parametrize("container", CONTAINERS)
every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def settled(spec):
    """Arrays that the spec's encoding holds to the bit."""
    arrays = make_arrays(spec)
    if spec.encoding == "f16":
        return arrays
    return dataclasses.replace(arrays, **from_q8(to_q8(arrays, spec), spec))


@every_container
@every_encoding
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"view_count": 3, "samples": 5},
        {"samples": 1, "grid": (1, 1), "top_k": 1, "classes": 1},
        {"classes": 70_000, "samples": 2},
        {"samples": 700, "grid": (2, 2)},
    ],
)
def test_round_trip(container, encoding, settings):
    spec = make_spec(container=container, encoding=encoding, **settings)
    arrays = settled(spec)
    data = containers.encode_shard(arrays, spec)
    assert containers.decode_shard(data, spec).equals(arrays)
    keys, content_hashes, class_ids = containers.read_shard_index(data, spec)
    assert keys == arrays.keys and (content_hashes == arrays.content_hash).all()
    assert (class_ids == arrays.class_id).all()


@every_container
def test_from_a_file(container, tmp_path):
    spec = make_spec(container=container)
    (tmp_path / "shard").write_bytes(containers.encode_shard(make_arrays(spec), spec))
    assert containers.decode_shard(tmp_path / "shard", spec).equals(make_arrays(spec))
    with pytest.raises(FormatError, match="missing"):
        containers.decode_shard(tmp_path / "none", spec)


@every_container
@every_encoding
def test_the_same_content_gives_the_same_bytes(container, encoding):
    spec = make_spec(samples=300, grid=(8, 7), container=container, encoding=encoding)
    first = containers.encode_shard(make_arrays(spec), spec)
    assert all(containers.encode_shard(make_arrays(spec), spec) == first for _ in range(3))


@every_container
def test_float32_is_rounded_to_what_is_stored(container):
    spec = make_spec(container=container)
    exact = make_arrays(spec, dtype="<f4")
    assert containers.encode_shard(exact, spec) == containers.encode_shard(make_arrays(spec), spec)


@every_container
def test_content_that_does_not_fit_is_not_written(container):
    spec = make_spec(container=container)
    with pytest.raises(FormatError, match="label set has"):
        containers.encode_shard(make_arrays(make_spec(grid=(5, 3))), spec)
    large = make_arrays(spec, dtype="<f4")
    large.logits[..., 0] = 1e6
    with pytest.raises(FormatError, match="float16"):
        containers.encode_shard(large, spec)


@every_container
@every_encoding
@settings(max_examples=30)
@given(cut=st.floats(0, 0.9999))
def test_a_cut_off_shard_is_refused(container, encoding, cut):
    spec = make_spec(container=container, encoding=encoding)
    data = containers.encode_shard(make_arrays(spec), spec)
    with pytest.raises(FormatError):
        containers.decode_shard(data[: int(len(data) * cut)], spec)


@every_container
@every_encoding
@settings(max_examples=50)
@given(place=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_a_flipped_bit_never_gives_other_labels(container, encoding, place, bit):
    spec = make_spec(container=container, encoding=encoding)
    arrays = settled(spec)
    data = bytearray(containers.encode_shard(arrays, spec))
    data[int(len(data) * place)] ^= 1 << bit
    try:
        found = containers.decode_shard(bytes(data), spec)
    except FormatError:
        return
    # A bit that nothing depends on, such as a date in the archive's directory.
    assert found.equals(arrays)


@every_container
@pytest.mark.parametrize("data", [b"", b"no archive", b"\0" * 2048, b"PK\5\6" + b"\0" * 18])
def test_what_is_no_shard_is_refused(container, data):
    spec = make_spec(container=container)
    with pytest.raises(FormatError):
        containers.decode_shard(data, spec)
    with pytest.raises(FormatError):
        containers.read_shard_index(data, spec)


@every_container
def test_another_label_sets_shard_is_refused(container):
    spec = make_spec(container=container)
    for other in (make_spec(grid=(5, 3)), make_spec(top_k=3), make_spec(classes=70_000), make_spec(classes=5)):
        data = containers.encode_shard(make_arrays(make_spec(container=container)), spec)
        with pytest.raises(FormatError):
            containers.decode_shard(data, make_spec(**{**_shape(other), "container": container}))


def _shape(spec):
    return {"grid": spec.grid, "top_k": spec.top_k, "classes": spec.num_classes}


# What only a zip of zarr arrays can get wrong.


def zip_entries(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def to_zip(entries, compression=zipfile.ZIP_STORED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


@pytest.fixture
def shard():
    spec = make_spec(samples=5)
    return spec, zip_entries(containers.encode_shard(make_arrays(spec), spec))


def test_entries_are_sorted_and_dated_alike():
    spec = make_spec(samples=5)
    with zipfile.ZipFile(io.BytesIO(containers.encode_shard(make_arrays(spec), spec))) as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == sorted(info.filename for info in infos)
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    assert {info.compress_type for info in infos} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("name", ["keys", "content_hash", "class_id", "views", "class_ids", "logits", "confidence"])
def test_a_missing_chunk_never_reads_as_zeros(shard, name):
    spec, entries = shard
    chunk = next(entry for entry in entries if entry.startswith(f"{name}/c/"))
    without = {entry: data for entry, data in entries.items() if entry != chunk}
    with pytest.raises(FormatError, match=f"lacks chunk .* of the array {name}"):
        containers.decode_shard(to_zip(without), spec)
    without = {entry: data for entry, data in entries.items() if not entry.startswith(f"{name}/")}
    with pytest.raises(FormatError, match=f"lacks the array {name}"):
        containers.decode_shard(to_zip(without), spec)


def test_chunks_of_zeros_are_written():
    spec = make_spec(samples=5)
    arrays = make_arrays(spec)
    arrays.class_id[:] = 0
    arrays.content_hash[:] = 0
    entries = zip_entries(containers.encode_shard(arrays, spec))
    assert {"class_id/c/0", "content_hash/c/0"} <= set(entries)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("zarr.json", {"attributes": {}}, "no label shard"),
        ("zarr.json", {"attributes": {"format": "stl-offline label set", "format_version": 2}}, "format_version is 2"),
        ("zarr.json", {"node_type": "array"}, "shard"),
        ("logits/zarr.json", {"data_type": "float32"}, "logits is float32"),
        ("logits/zarr.json", {"shape": [5, 1, 3, 5, 3]}, "logits is"),
        ("logits/zarr.json", {"shape": [4, 1, 3, 5, 4]}, "logits is"),
        ("keys/zarr.json", {"shape": [10**15]}, "shard"),
        ("keys/zarr.json", {"shape": []}, "shard"),
        ("logits/zarr.json", {"zarr_format": 2}, "shard"),
        ("logits/zarr.json", {"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]}, "as no label set is"),
        ("logits/zarr.json", {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, "shard"),
        ("logits/zarr.json", {"chunk_grid": {"name": "irregular"}}, "shard"),
        ("views/zarr.json", {"chunk_key_encoding": {"name": "v2"}}, "as no label set is"),
    ],
)
def test_metadata_that_lies_is_refused(shard, name, changes, words):
    spec, entries = shard
    entries[name] = json.dumps(json.loads(entries[name]) | changes).encode()
    with pytest.raises(FormatError, match=words):
        containers.decode_shard(to_zip(entries), spec)


def test_archives_that_version_1_never_writes_are_refused(shard):
    spec, entries = shard
    with pytest.raises(FormatError, match="compressed|overlap"):
        containers.decode_shard(to_zip(entries, zipfile.ZIP_DEFLATED), spec)
    data = to_zip(entries)
    stream = io.BytesIO(data)
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("zarr.json", entries["zarr.json"])
    with pytest.raises(FormatError, match="twice"):
        containers.decode_shard(stream.getvalue(), spec)


def test_a_swapped_chunk_is_seen():
    spec = make_spec(samples=5)
    arrays = make_arrays(spec)
    entries = zip_entries(containers.encode_shard(arrays, spec))
    entries["logits/c/0/0/0/0/0"] = entries["confidence/c/0/0/0/0"]
    with pytest.raises(FormatError):
        containers.decode_shard(to_zip(entries), spec)
    assert np.isfinite(arrays.logits).all()
