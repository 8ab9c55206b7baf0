"""Everything that is wrong with a label set is found and named, not only the first thing."""

import json

import numpy as np
import pytest

from stl_offline.errors import FormatError
from stl_offline.files import canonical_json, sha256_bytes
from stl_offline.labels.format import containers, tar_shard, zarr_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.transfer import pull
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SPEC = make_spec(samples=18, grid=(4, 3))


@pytest.fixture(params=["zarr", "webdataset"])
def path(request, tmp_path):
    write_set(tmp_path / "labels", make_spec(samples=18, grid=(4, 3), container=request.param), 6)
    return tmp_path / "labels"


def replace_shard(path, index, data):
    """Another file under a shard's name, with a record that agrees with it: damage that checksums do not show."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    shard = manifest["shards"][index]
    (path / shard["name"]).write_bytes(data)
    shard |= {"bytes": len(data), "sha256": sha256_bytes(data)}
    (path / "manifest.json").write_bytes(canonical_json(manifest))


def encode_unchecked(arrays, spec):
    """What a writer stores that does not look at its values (f16)."""
    names = ("content_hash", "class_id", "views", "class_ids", "logits", "confidence")
    stored = {"keys": np.array(arrays.keys, dtype=np.dtypes.StringDType())}
    stored |= {name: getattr(arrays, name) for name in names}
    module = {"zarr": zarr_shard, "webdataset": tar_shard}[spec.container]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "to_stored", lambda arrays, spec: stored)
        return module.encode(arrays, spec)


def test_a_whole_set(path):
    told = []
    report = verify(open_label_set(path), found=told.append)
    assert (report.shards, report.samples, report.faults, report.notes, told) == (6, 18, (), (), [])


def test_every_fault_is_named(path):
    labels = open_label_set(path)
    names = [shard.name for shard in labels.shards]
    whole = [(path / name).read_bytes() for name in names]
    (path / names[0]).unlink()
    (path / names[1]).write_bytes(whole[1][:-100])
    (path / names[2]).write_bytes(whole[2][:300] + bytes([whole[2][300] ^ 1]) + whole[2][301:])
    replace_shard(path, 3, containers.encode_shard(make_arrays(labels.spec, 0, 4), labels.spec))
    replace_shard(path, 4, b"no shard at all" * 100)
    told = []
    report = verify(open_label_set(path), found=told.append)
    assert told == list(report.faults) and len(told) == 5
    for line, name, words in zip(
        told,
        names,
        (
            "is missing",
            f"has {len(whole[1]) - 100} bytes, the manifest says {len(whole[1])}",
            "is damaged (its SHA-256 differs)",
            "holds 4 samples, the manifest says 3",
            "shard",
        ),
        strict=False,
    ):
        assert line.startswith(f"{name}: ") and words in line and "\n" not in line
        assert line.count(name) == 1


def test_values_out_of_range_are_named(path):
    labels = open_label_set(path)
    for index, (name, place, value) in enumerate(
        (("class_ids", (1, 0, 2, 1, 0), 9), ("logits", (0, 0, 0, 0, 3), np.nan), ("confidence", (2, 0, 1, 1), 0))
    ):
        arrays = make_arrays(labels.spec, 3 * index, 3 * index + 3)
        getattr(arrays, name)[place] = value
        replace_shard(path, index, encode_unchecked(arrays, labels.spec))
    faults = verify(open_label_set(path)).faults
    assert [fault.split(": ")[0] for fault in faults] == [shard.name for shard in labels.shards[:3]]
    for fault, position, words in zip(
        faults,
        (1, 3, 8),
        ("class id is not below the class count", "logit is not finite", "confidence is not within (0, 1]"),
        strict=True,
    ):
        assert words in fault and make_key(position) in fault


def test_keys_are_unique_in_the_whole_set(tmp_path):
    with LabelSetWriter(tmp_path, SPEC, 6) as writer:
        for index in range(6):
            first, last = (0, 3) if index == 4 else writer.shard_range(index)
            writer.write_shard(index, make_arrays(SPEC, first, last))
        writer.finish()
    labels = open_label_set(tmp_path)
    faults = verify(labels).faults
    assert len(faults) == 3
    for position, fault in enumerate(faults):
        assert fault == (
            f"{labels.shards[4].name}: the key {make_key(position)} is there twice, first in {labels.shards[0].name}"
        )


def test_a_view_that_the_manifest_denies(tmp_path):
    arrays = make_arrays(SPEC)
    arrays.views[5, 0, 2] = 0.25
    with LabelSetWriter(tmp_path, SPEC, 1) as writer:
        with pytest.raises(FormatError, match="not the whole image"):
            writer.write_shard(0, arrays)
        writer.write_encoded(0, encode_unchecked(arrays, SPEC))
        writer.finish()
    (fault,) = verify(open_label_set(tmp_path)).faults
    assert f"the view of {make_key(5)} is not the whole image" in fault


def test_what_is_odd_but_no_fault(path, tmp_path):
    pull(open_label_set(path), tmp_path / "some", shards="1,3")
    (tmp_path / "some" / "notes.txt").write_text("")
    report = verify(open_label_set(tmp_path / "some"))
    assert (report.shards, report.samples, report.faults) == (2, 6, ())
    assert report.notes == (
        "4 shards were not pulled, and not looked at",
        "notes.txt lies there and does not belong to the label set",
    )
