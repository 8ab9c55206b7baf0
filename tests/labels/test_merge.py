"""One label set of several: whole shards, keys that are unique, settings that agree."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from stl_offline.errors import FormatError, InputError, JoinError
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.spec import ENCODINGS
from stl_offline.labels.transfer import pull
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files
from tests.labels.synthetic import make_arrays, make_spec, write_set


def write_part(path, first, last, shards, **settings):
    """Labels of the samples [first, last) of a data set, as one team has them."""
    creation = {"seed": 3, "shards": shards, "batch_size": last}
    spec = make_spec(samples=last - first, creation=creation, **settings)
    with LabelSetWriter(path, spec, shards) as writer:
        for index in writer.todo():
            own = [first + bound for bound in writer.shard_range(index)]
            writer.write_shard(
                index, make_arrays(dataclasses.replace(spec, source={"samples": 99, "fingerprint": ""}), *own)
            )
        writer.finish()
    return open_label_set(path)


@pytest.fixture(params=["zarr", "webdataset"])
def parts(request, tmp_path):
    """Three teams' sets of 5, 4 and 7 images in 2, 1 and 3 shards."""
    bounds = ((0, 5, 2), (5, 9, 1), (9, 16, 3))
    return [write_part(tmp_path / f"team{i}", *each, container=request.param) for i, each in enumerate(bounds)]


def test_shards_are_copied_and_numbered_anew(parts, tmp_path):
    manifest = merge(parts, tmp_path / "all")
    merged = open_label_set(tmp_path / "all")
    assert manifest == merged.manifest and len(merged) == 16
    suffix = ".zarr.zip" if merged.spec.container == "zarr" else ".tar"
    assert [shard.name for shard in merged.shards] == [f"labels-{i:05d}-of-00006{suffix}" for i in range(6)]
    sources = [part.read_bytes(index) for part in parts for index in part.present]
    assert [merged.read_bytes(index) for index in range(6)] == sources
    whole = make_arrays(merged.spec)
    assert list(merged) == whole.keys
    assert verify(merged).faults == ()
    # What only one job's command was is not the whole set's.
    assert merged.spec.creation == {"seed": 3}
    assert set(files(tmp_path / "all")) == {"README.md", "manifest.json", *(shard.name for shard in merged.shards)}


def test_the_fingerprint_is_that_of_the_images(parts, tmp_path):
    """As docs/format.md tells, computed anew: the same however the images were divided among the jobs."""
    merged = merge(parts, tmp_path / "all")
    whole = make_arrays(merged.spec)
    digest = hashlib.sha256()
    for part in (
        json.dumps(list(merged.spec.class_names)).encode(),
        json.dumps(whole.keys).encode(),
        whole.class_id.astype("<i8").tobytes(),
        whole.content_hash.astype("<u8").tobytes(),
    ):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert merged.spec.source == {"samples": 16, "fingerprint": digest.hexdigest()}
    merge(parts[:2], tmp_path / "two")
    other = merge([open_label_set(tmp_path / "two"), parts[2]], tmp_path / "other way")
    assert other == merged
    assert files(tmp_path / "other way") == files(tmp_path / "all")
    assert merge(parts[::-1], tmp_path / "backwards").spec.source != merged.spec.source


def test_an_interrupted_merge_goes_on(parts, tmp_path, monkeypatch):
    merge(parts, tmp_path / "undisturbed")
    real, written = LabelSetWriter.write_encoded, []

    def write(self, *given):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(given[0])
        return real(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LabelSetWriter, "write_encoded", write)
        merge(parts, tmp_path / "all", workers=1)
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LabelSetWriter, "write_encoded", write)
        merge(parts, tmp_path / "all")
    assert len(written) == 2
    assert files(tmp_path / "all") == files(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 3}, "top_k is 4 and 3"),
        ({"grid": (5, 3)}, r"grid is \[3, 5\] and \[5, 3\]"),
        ({"view_count": 2}, "views.kind is .whole. and .random."),
        ({"classes": 8}, "class_names is .*"),
        ({"labeler": {"architecture": "other", "weights_sha256": "0" * 64, "licence": "Apache-2.0"}},
         'labeler.architecture is "synthetic" and "other"'),
        ({"encoding": "q8"}, 'encoding is "f16" and "q8"; change the encoding with: stl-offline labels convert'),
        ({"container": "webdataset"}, '"zarr" and "webdataset"; change the container with: stl-offline labels convert'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_conflicting_settings_are_named_with_both_values(tmp_path, settings, words):
    ours = write_part(tmp_path / "ours", 0, 4, 1)
    theirs = write_part(tmp_path / "theirs", 4, 8, 1, **settings)
    with pytest.raises(InputError, match=f"ours and .*theirs cannot be merged: .*{words}"):
        merge([ours, theirs], tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.parametrize("encoding", ["q8", "f16"])
def test_converted_sets_are_merged(tmp_path, encoding):
    """What the message of different encodings advises. The merged set's bounds are the wider ones."""
    sets = [write_part(tmp_path / name, *at, 1, encoding=name) for name, at in (("q8", (0, 4)), ("f16", (4, 9)))]
    with pytest.raises(InputError, match='encoding is "q8" and "f16"; change the encoding with'):
        merge(sets, tmp_path / "all")
    for number, name in enumerate(("q8", "f16")):
        if name != encoding:
            convert(sets[number], tmp_path / "converted", encoding=encoding)
            sets[number] = open_label_set(tmp_path / "converted")
    for order, out in ((sets, "all"), (sets[::-1], "reversed")):
        merge(order, tmp_path / out)
        merged = open_label_set(tmp_path / out)
        assert len(merged) == 9 and not verify(merged).faults
        # As if all of them had been q8, which the whole may become.
        both = ENCODINGS["f16"]["confidence_relative"] + ENCODINGS["q8"]["confidence_relative"]
        assert merged.spec.bounds == ENCODINGS["f16"] | ENCODINGS["q8"] | {"confidence_relative": both}
        convert(merged, tmp_path / f"{out}-q8", encoding="q8")
        assert open_label_set(tmp_path / f"{out}-q8").spec.bounds == merged.spec.bounds


def test_keys_that_two_sets_share_are_counted_and_named(tmp_path):
    ours = write_part(tmp_path / "ours", 0, 8, 2)
    theirs = write_part(tmp_path / "theirs", 3, 10, 2)
    with pytest.raises(JoinError) as caught:
        merge([ours, theirs], tmp_path / "all")
    text = str(caught.value)
    assert "5 keys are in these label sets twice" in text and "\n" not in text
    assert f"{list(ours)[3]} in {ours.place}/{ours.shards[0].name} and {theirs.place}/{theirs.shards[0].name}" in text
    assert not (tmp_path / "all").exists()
    with pytest.raises(JoinError, match="8 keys"):
        merge([ours, ours], tmp_path / "all")


def test_parts_of_one_set_that_were_pulled_apart(tmp_path):
    write_set(tmp_path / "whole", make_spec(samples=9), 3)
    whole = open_label_set(tmp_path / "whole")
    for name, shards in (("a", "0,1"), ("b", "2")):
        pull(whole, tmp_path / name, shards=shards)
    merged = merge([open_label_set(tmp_path / "a"), open_label_set(tmp_path / "b")], tmp_path / "all")
    assert [(shard.bytes, shard.sha256) for shard in merged.shards] == [
        (shard.bytes, shard.sha256) for shard in whole.shards
    ]


def test_what_cannot_be_merged(parts, tmp_path):
    with pytest.raises(InputError, match="two label sets or more, got 1"):
        merge(parts[:1], tmp_path / "all")
    name = parts[1].shards[0].name
    (tmp_path / "team1" / name).write_bytes(np.random.default_rng(0).bytes(parts[1].shards[0].bytes))
    with pytest.raises(FormatError, match=f"team1/{name}"):
        merge(parts, tmp_path / "all")
