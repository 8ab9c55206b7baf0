"""Files of a label set that are too large, too deep or no text are refused in one line, before they fill the memory."""

import json
import re
import time
import tracemalloc

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.errors import FormatError, InputError
from stl_offline.files import canonical_json
from stl_offline.labels.keys import find_duplicates
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_spec, write_set

SPEC = make_spec(samples=6)


@pytest.fixture
def labels(tmp_path):
    write_set(tmp_path, SPEC, 2)
    return tmp_path


def deep(levels):
    return b"[" * levels + b"]" * levels


FLOODS = {
    "objects": b'{"shards": [' + b"{}," * 10_000_000 + b"{}]}",
    "lists": b'{"shards": [' + b"[]," * 10_000_000 + b"[]]}",
    "numbers": b'{"class_names": [' + b"7," * 10_000_000 + b"7]}",
}


@pytest.mark.parametrize("name", ["manifest.json", "partial.json", ".partial/job.json"])
@pytest.mark.parametrize("flood", FLOODS)
def test_millions_of_values_are_never_built(labels, name, flood):
    if name.endswith("job.json"):
        (labels / "manifest.json").unlink()
        (labels / ".partial").mkdir()
    (labels / name).write_bytes(FLOODS[flood])
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=rf"{name}.*(values|bytes)"):
            open_label_set(labels)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(FLOODS[flood])
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5


@pytest.mark.parametrize("name", ["manifest.json", "partial.json", ".partial/job.json"])
def test_larger_files_are_not_read(labels, name):
    if name.endswith("job.json"):
        (labels / "manifest.json").unlink()
        (labels / ".partial").mkdir()
    with open(labels / name, "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(FormatError, match="1,099,511,627,776 bytes"):
        open_label_set(labels)


def test_a_large_record_is_none(tmp_path):
    with LabelSetWriter(tmp_path, SPEC, 2) as writer:
        record = tmp_path / ".partial/records/00000" / f"{writer.shard_name(0)}.json"
        record.parent.mkdir(parents=True)
        with open(record, "wb") as stream:
            stream.truncate(1 << 40)
        assert writer.missing() == [0, 1]


@pytest.mark.parametrize("levels", [17, 900, 100_000])
@pytest.mark.parametrize("entry", ["creation", "labeler", "views", "class_names", "grid", "bounds", "shards", "format"])
def test_deep_settings(labels, entry, levels):
    entries = json.loads((labels / "manifest.json").read_bytes())
    if isinstance(entries[entry], dict):
        entries[entry]["deep"] = "HERE"
    else:
        entries[entry] = "HERE"
    (labels / "manifest.json").write_bytes(canonical_json(entries).replace(b'"HERE"', deep(levels)))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open_label_set(labels)


@pytest.mark.parametrize("entry", ["creation", "labeler", "preprocessing", "source", "class_names"])
def test_halves_of_surrogate_pairs(labels, entry):
    entries = json.loads((labels / "manifest.json").read_bytes())
    if entry == "class_names":
        entries[entry][0] = "\ud800"
    else:
        entries[entry]["name"] = "\ud800"
    (labels / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open_label_set(labels)


def test_names_that_are_no_text_are_refused_when_written():
    with pytest.raises(InputError, match="class names"):
        make_spec(class_names=("a", "\udcff", *"bcdef"))
    with pytest.raises(InputError, match="creation"):
        make_spec(creation={"path": "\udcff"})


@pytest.mark.parametrize("data", [b"[]", b"7", b'"text"', b"null", '{"format": 1}'.encode("utf-16"), b"\xef\xbb\xbf{}"])
def test_manifests_that_are_no_object(labels, data):
    (labels / "manifest.json").write_bytes(data)
    with pytest.raises(FormatError, match=r"manifest\.json"):
        open_label_set(labels)


@pytest.mark.parametrize("count", [1 << 53, 10**400])
def test_numbers_beyond_any_set(count):
    entries = make_spec().to_json()
    entries["source"]["samples"] = count
    with pytest.raises(FormatError, match="sample count"):
        LabelSpec.from_json(entries)


@pytest.mark.parametrize("change", [{"scale": 3}, {"ratio": ["a", "b"]}, {"scale": [1]}, {"flip": "x"}], ids=str)
def test_settings_of_random_views_are_numbers(change):
    entries = make_spec(view_count=2).to_json()
    entries["views"] |= change
    with pytest.raises(FormatError, match=f"the {next(iter(change))} of random views"):
        LabelSpec.from_json(entries)


def only(name, data):
    """Leaves nothing in a folder but one file."""

    def change(path):
        for file in path.iterdir():
            file.unlink()
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(canonical_json(data))

    return change


def beside(data):
    return lambda path: (path / "partial.json").write_text(data)


def manifest(**changes):
    def change(path):
        entries = json.loads((path / "manifest.json").read_bytes())
        (path / "manifest.json").write_bytes(canonical_json(entries | changes))

    return change


# A label set of which no shard is there, in each way that its files can name.
EMPTY = {
    "partial: none": (beside('{"shards": []}'), "it lists no shards; pull the shards again"),
    "partial: null": (beside('{"shards": null}'), "its shards are no numbers below 2"),
    "partial: object": (beside('{"shards": {}}'), "its shards are no numbers below 2"),
    "partial: no list": (beside("{}"), "'shards'; pull the shards again"),
    "partial: too high": (beside('{"shards": [2]}'), "its shards are no numbers below 2"),
    "partial: negative": (beside('{"shards": [-1]}'), "its shards are no numbers below 2"),
    "partial: true": (beside('{"shards": [true]}'), "its shards are no numbers below 2"),
    "partial: empty file": (beside(""), "it is no JSON"),
    "manifest: no shards": (manifest(shards=[]), "the shards hold 0 samples, the source has 6"),
    "manifest: no shards, no samples": (
        manifest(shards=[], source={"samples": 0, "fingerprint": "none"}),
        "the source's sample count must be a positive integer",
    ),
    "manifest: no table": (manifest(shards=None), "the manifest has no shard table"),
    "job: nothing done": (
        only(".partial/job.json", {**SPEC.to_json(), "shard_samples": [3, 3]}),
        "is not finished: 0 of 2 shards are done",
    ),
    "job: no shards": (
        only(".partial/job.json", {**SPEC.to_json(), "shard_samples": []}),
        "its shard sizes are not positive numbers that sum to the set's images",
    ),
    "job: other sizes": (
        only(".partial/job.json", {**SPEC.to_json(), "shard_samples": [3, 4]}),
        "its shard sizes are not positive numbers that sum to the set's images",
    ),
    "pull: nothing done": (only(".partial/pull.json", {"shards": []}), "was not pulled completely"),
    "folder: a shard alone": (lambda path: (path / "manifest.json").unlink(), "holds no label set: it has no manifest"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_a_set_without_shards_is_never_whole(labels, capsys, name):
    change, words = EMPTY[name]
    change(labels)
    with pytest.raises(FormatError, match=re.escape(words)):
        open_label_set(labels)
    assert main(["labels", "verify", str(labels)]) == 1
    shown = capsys.readouterr()
    assert "whole" not in shown.out and words in shown.err and "Traceback" not in shown.err


@pytest.mark.parametrize("present", [(), (2,), (-1, 0)])
def test_a_set_in_memory_has_a_shard(labels, present):
    whole = open_label_set(labels)
    with pytest.raises(FormatError, match="none of its 2 shards is here"):
        LabelSet(whole.storage, whole.manifest, present)


def test_duplicates_among_many_shards_take_linear_time():
    """A thousand repeated keys once made every shard cost a comparison with all of them."""
    repeated = np.arange(1000, dtype=np.uint64)
    hashes = [repeated, repeated, *np.arange(1000, 101_000, dtype=np.uint64).reshape(-1, 2)]
    started = time.process_time()
    found = find_duplicates(hashes, lambda index: [str(value) for value in hashes[index].tolist()])
    assert found.count == 1000 and found.examples[0] == ("0", 0, 1)
    assert time.process_time() - started < 2
