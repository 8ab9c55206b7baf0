"""The manifest: round trips, and refusals of what cannot be or is not known."""

import json

import numpy as np
import pytest

from stl_offline.errors import FormatError, InputError
from stl_offline.labels.manifest import Manifest, ShardRecord, shard_name, shard_range
from stl_offline.labels.spec import LabelSpec, differences
from tests.labels.synthetic import make_spec


def make_manifest(samples=10, shards=3):
    spec = make_spec(samples)
    records = []
    for index in range(shards):
        first, last = shard_range(index, shards, samples)
        records.append(
            ShardRecord(shard_name(index, shards, "zarr"), first, last - first, 1000 + index, f"{index:064x}")
        )
    return Manifest(spec, tuple(records))


def test_round_trip():
    manifest = make_manifest()
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    assert again.to_bytes() == manifest.to_bytes()
    assert differences(manifest.spec, again.spec) == []


def test_the_manifest_says_what_a_stranger_needs():
    entries = json.loads(make_manifest().to_bytes())
    assert entries["format"] == "stl-offline label set"
    assert entries["format_version"] == 1
    assert entries["value_kind"] == "logits"
    assert entries["grid"] == [3, 5]
    assert entries["class_id_dtype"] == "uint16"
    assert entries["bounds"] == {"logit_relative": 2**-11, "confidence_relative": 2**-11}
    assert entries["shards"][1] == {
        "name": "labels-00001-of-00003.zarr.zip",
        "first": 3,
        "samples": 3,
        "bytes": 1001,
        "sha256": "0" * 63 + "1",
    }
    # No clock and no folder: two jobs with the same input give the same bytes.
    assert not {"date", "time", "path", "out"} & set(entries)


def test_ids_grow_with_the_classes():
    assert make_spec(classes=65_535).id_dtype == np.dtype("<u2")
    assert make_spec(classes=65_536).id_dtype == np.dtype("<u4")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"top_k": 8}, "top-k must lie between 1 and the 7 classes"),
        ({"top_k": 0}, "top-k"),
        ({"top_k": True}, "top-k"),
        ({"grid": (3,)}, "token grid"),
        ({"grid": (3, 0)}, "token grid"),
        ({"class_names": ()}, "class names"),
        ({"class_names": ("a", "")}, "class names"),
        ({"class_names": ("a",) * 4}, "differ"),
        ({"views_per_image": 2}, "one view"),
        ({"views": {"kind": "spiral"}}, "spiral"),
        ({"views": {"kind": "random", "seed": 1}}, "views lacks scale"),
        ({"labeler": {"architecture": "x"}}, "labeler lacks weights_sha256, licence"),
        ({"preprocessing": None}, "preprocessing must be a dict"),
        ({"source": {"samples": 0, "fingerprint": ""}}, "sample count"),
        ({"creation": {"when": np.float32(1)}}, "JSON"),
        ({"creation": {"scale": float("nan")}}, "JSON"),
        ({"encoding": "f8"}, "unknown encoding 'f8'"),
        ({"container": "hdf5"}, "unknown container 'hdf5'"),
        ({"value_kind": "probabilities"}, "unknown value kind"),
        ({"format_version": 3}, "unknown format version 3"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        make_spec(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "another"}, "not a label set"),
        ({"format_version": 3}, "version 3 is unknown"),
        ({"format_version": None}, "version None is unknown"),
        # The version is looked at before anything else is, which a later version may have changed.
        ({"format_version": 99, "encoding": "q1", "grid": "large"}, "version 99 is unknown"),
        ({"encoding": "q1"}, "unknown encoding 'q1'"),
        ({"value_kind": "ranks"}, "unknown value kind 'ranks'"),
        ({"container": "hdf5"}, "unknown container"),
        ({"grid": "large"}, "token grid"),
        ({"grid": None}, "wrong type"),
        ({"classes": 8}, "classes 8"),
        ({"class_id_dtype": "uint32"}, "class_id_dtype 'uint32'"),
        ({"bounds": {}}, "bounds must be some of"),
        ({"bounds": {"none": 0.1}}, "bounds must be some of"),
        ({"bounds": {"logit_relative": 0}}, "logit_relative must lie between 0 and 1"),
        ({"bounds": {"logit_relative": "0.1"}}, "logit_relative must lie between 0 and 1"),
        ({"bounds": {"logit_relative": float("nan")}}, "NaN is no JSON number"),
        ({"top_k": float("inf")}, "Infinity is no JSON number"),
        ({"creation": {"seed": float("-inf")}}, "Infinity is no JSON number"),
        ({"shards": None}, "no shard table"),
        ({"shards": [None]}, "record"),
    ],
)
def test_manifests_that_lie_are_refused(changes, words):
    entries = json.loads(make_manifest().to_bytes()) | changes
    with pytest.raises(FormatError, match=words):
        Manifest.from_bytes(json.dumps(entries).encode())


@pytest.mark.parametrize("name", json.loads(make_manifest().to_bytes()))
def test_a_manifest_with_an_entry_missing_is_refused(name):
    entries = json.loads(make_manifest().to_bytes())
    del entries[name]
    with pytest.raises(FormatError):
        Manifest.from_bytes(json.dumps(entries).encode())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "../labels-00001-of-00003.zarr.zip"}, "no shard's name"),
        ({"name": "/etc/passwd"}, "no shard's name"),
        ({"name": "labels-00002-of-00003.zarr.zip"}, "expected labels-00001-of-00003"),
        ({"first": 4}, "starts at sample 4"),
        ({"first": -1}, "impossible"),
        ({"samples": 2}, "starts at sample 6, expected 5"),
        ({"samples": 0}, "impossible"),
        ({"bytes": "many"}, "impossible"),
        ({"sha256": "beef"}, "SHA-256"),
    ],
)
def test_shard_tables_that_lie_are_refused(changes, words):
    entries = json.loads(make_manifest().to_bytes())
    entries["shards"][1] |= changes
    with pytest.raises(FormatError, match=words):
        Manifest.from_bytes(json.dumps(entries).encode())


def test_a_shard_too_few_is_refused():
    entries = json.loads(make_manifest().to_bytes())
    entries["source"]["samples"] = 11
    with pytest.raises(FormatError, match="10 samples, the source has 11"):
        Manifest.from_bytes(json.dumps(entries).encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"format": 1' + b"0" * 5000 + b"}",
        make_manifest().to_bytes()[:-20],
    ],
)
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(FormatError):
        Manifest.from_bytes(data)


def test_differences_are_named():
    ours = make_spec(top_k=3, labeler={"architecture": "a", "weights_sha256": "1", "licence": "MIT"})
    theirs = make_spec(top_k=4, labeler={"architecture": "a", "weights_sha256": "2", "licence": "MIT"})
    found = differences(ours, theirs)
    assert [tuple(each) for each in found] == [("labeler.weights_sha256", "1", "2"), ("top_k", 3, 4)]
    assert [each.entry for each in found] == ["labeler", "top_k"]
    assert [str(each) for each in found] == ['labeler.weights_sha256 is "1" and "2"', "top_k is 3 and 4"]


def test_shards_share_the_samples_evenly():
    for samples, shards in ((10, 3), (7, 7), (1000, 64)):
        ranges = [shard_range(index, shards, samples) for index in range(shards)]
        assert [first for first, _ in ranges] == [0, *[last for _, last in ranges[:-1]]]
        assert ranges[-1][1] == samples
        sizes = {last - first for first, last in ranges}
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 1


def test_a_spec_does_not_change_with_its_arguments():
    labeler = {"architecture": "a", "weights_sha256": "1", "licence": "MIT"}
    spec = make_spec(labeler=labeler)
    labeler["architecture"] = "b"
    assert spec.labeler["architecture"] == "a"
    assert LabelSpec.from_json(spec.to_json()) == spec
