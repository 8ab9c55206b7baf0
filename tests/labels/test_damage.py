"""Shards and manifests with bytes changed at any position: refused, or unchanged in what they say."""

import dataclasses
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError
from stl_offline.files import sha256_bytes
from stl_offline.labels.format import containers
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.spec import CONTAINERS, ENCODINGS
from tests.labels.synthetic import make_arrays, make_spec, write_set

SPEC = make_spec(samples=5)

SHARDS = {
    (container, encoding): (
        dataclasses.replace(SPEC, container=container, encoding=encoding, bounds=None),
        containers.encode_shard(
            make_arrays(SPEC), dataclasses.replace(SPEC, container=container, encoding=encoding, bounds=None)
        ),
    )
    for container in CONTAINERS
    for encoding in ENCODINGS
}


@pytest.mark.parametrize("form", SHARDS, ids="-".join)
@settings(max_examples=60)
@given(changes=st.lists(st.tuples(st.floats(0, 0.9999), st.integers(0, 255)), min_size=1, max_size=4))
def test_bytes_changed_anywhere_are_refused_or_change_nothing_else(form, changes):
    """Without the checksum, which would see each of them: what a reader alone makes of it."""
    spec, data = SHARDS[form]
    data = bytearray(data)
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        containers.decode_shard(bytes(data), spec).check(spec)
    except FormatError as error:
        assert "\n" not in str(error)


@settings(max_examples=200)
@given(
    changes=st.lists(
        st.tuples(st.floats(0, 0.9999), st.sampled_from(list(b'0-9eE.,:[]{}"\xff NaI\\'))), min_size=1, max_size=3
    )
)
def test_a_manifest_changed_anywhere_is_refused_or_still_one(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    if not folder.exists():
        write_set(folder, SPEC, 2)
    data = bytearray((folder / "manifest.json").read_bytes())
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        manifest = Manifest.from_bytes(bytes(data))
    except FormatError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_a_flipped_byte_is_seen_wherever_it_is(tmp_path):
    """With the checksum: every single byte of a shard, one after the other."""
    write_set(tmp_path, make_spec(samples=1, grid=(1, 1), classes=2, top_k=1), 1)
    labels = open_label_set(tmp_path)
    file = tmp_path / labels.shards[0].name
    data = file.read_bytes()
    with open(file, "r+b", buffering=0) as stream:
        for place in range(len(data)):
            os.pwrite(stream.fileno(), bytes([data[place] ^ 1]), place)
            with pytest.raises(FormatError, match="SHA-256 differs"):
                labels.read_bytes(0)
            os.pwrite(stream.fileno(), data[place : place + 1], place)
    assert sha256_bytes(data) == labels.shards[0].sha256
