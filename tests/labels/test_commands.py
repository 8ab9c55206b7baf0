"""``stl-offline labels …`` as a user calls it: what is printed, and one line and a code for what goes wrong."""

import json
import subprocess
import sys

import pytest
import yaml

from stl_offline.cli.main import main
from stl_offline.labels.label_set import open_label_set
from tests.labels.crash import files
from tests.labels.synthetic import make_spec, write_set


@pytest.fixture
def labels(tmp_path, monkeypatch):
    write_set(tmp_path / "labels", make_spec(samples=12), 4)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "labels"


def call(capsys, *words):
    code = main(["labels", *words])
    captured = capsys.readouterr()
    if code:
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return code, captured.out, captured.err


def test_the_way_of_a_shared_set(labels, tmp_path, capsys):
    place = f"memory://{tmp_path.name}/shared"
    assert call(capsys, "push", "labels", place)[:2] == (
        0,
        f"label set: {place} (4 shards sent, {sum(s.bytes for s in open_label_set(labels).shards):,} bytes; "
        "0 were there already)\n",
    )
    code, out, _ = call(capsys, "pull", place, "some", "--shards", "1,3")
    assert code == 0 and "2 shards fetched" in out and "it holds the shards 1,3 of 4" in out
    code, out, _ = call(capsys, "inspect", "some")
    assert code == 0 and "here:        the shards 1,3, 6 images" in out
    code, out, _ = call(capsys, "verify", "some")
    assert code == 0 and "all 2 shards are whole (6 images)" in out and "note: 2 shards were not pulled" in out
    assert call(capsys, "pull", place, "some")[0] == 0
    assert files(tmp_path / "some") == files(labels)
    code, out, _ = call(capsys, "verify", place)
    assert code == 0 and "all 4 shards are whole" in out


def test_convert_merge_and_stats(labels, tmp_path, capsys):
    code, out, _ = call(
        capsys, "convert", "labels", "tar", "--format", "webdataset", "--encoding", "q8", "--shards", "2"
    )
    assert code == 0 and "12 images in 2 shards, webdataset, q8" in out
    code, out, _ = call(capsys, "stats", "tar")
    assert code == 0 and "images:       12 in 2 shards" in out
    code, out, _ = call(capsys, "stats", "labels", "--shards", "1", "--json")
    assert code == 0 and json.loads(out)["samples"] == 3
    call(capsys, "pull", "labels", "a", "--shards", "0-1")
    call(capsys, "pull", "labels", "b", "--shards", "2-3")
    code, out, _ = call(capsys, "merge", "a", "b", "whole")
    assert code == 0 and "12 images in 4 shards" in out
    assert list(open_label_set("whole")) == list(open_label_set("labels"))


@pytest.mark.parametrize(
    "words",
    [
        ["pull", "labels", "out"],
        ["push", "labels", "out"],
        ["convert", "labels", "out", "--encoding", "q8"],
        ["merge", "a", "b", "out"],
    ],
    ids=lambda words: words[0],
)
def test_a_finished_command_run_again_says_that_nothing_was_done(labels, tmp_path, capsys, words):
    call(capsys, "pull", "labels", "a", "--shards", "0-1")
    call(capsys, "pull", "labels", "b", "--shards", "2-3")
    code, first, _ = call(capsys, *words)
    before = files(tmp_path / "out")
    assert code == 0 and "already complete" not in first
    code, again, _ = call(capsys, *words)
    assert code == 0 and again.endswith("; already complete, nothing was done\n")
    assert files(tmp_path / "out") == before


def test_one_shard_of_one_image(tmp_path, capsys):
    write_set(tmp_path / "one", make_spec(samples=1), 1)
    code, out, _ = call(capsys, "verify", str(tmp_path / "one"))
    assert code == 0 and out.endswith("one: its shard is whole (1 image)\n")
    code, out, _ = call(capsys, "convert", str(tmp_path / "one"), str(tmp_path / "tar"), "--format", "webdataset")
    assert code == 0 and "(1 image in 1 shard, webdataset" in out


def test_each_fault_is_a_line_and_the_code_is_1(labels, capsys):
    names = [shard.name for shard in open_label_set(labels).shards]
    (labels / names[0]).unlink()
    (labels / names[2]).write_bytes(b"cut off")
    code, out, err = call(capsys, "verify", "labels")
    assert code == 1 and "labels has 2 faults in 4 shards" in err
    assert [line.split(": ")[0] for line in out.splitlines()] == [names[0], names[2]]


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["inspect", "nowhere"], 1, "there is no label set at nowhere"),
        (["verify", "ftp3://x/y"], 1, "ftp3://x/y is no address of a label set"),
        (["stats", "labels", "--shards", "9"], 1, "--shards must lie between 1 and the 4 shards that are here, got 9"),
        (["convert", "labels", "out", "--format", "hdf5"], 1, "unknown container 'hdf5'; known here: zarr, webdataset"),
        (["convert", "labels", "labels", "--encoding", "q8"], 1, "label set with other settings"),
        (["merge", "labels", "out"], 1, "two label sets or more"),
        (["merge", "labels", "labels", "out"], 1, "12 keys are in these label sets twice"),
        (["pull", "labels", "out", "--shards", "7"], 1, "there are no shards 7: the label set has 0 to 3"),
        (["verify", "labels", "--workers", "-1"], 2, "Invalid value for '--workers': -1 is not in the range x>=0"),
        (["stats", "labels", "--workers", "-3"], 2, "Invalid value for '--workers': -3 is not in the range x>=0"),
        (
            ["convert", "labels", "out", "--workers", "-1"],
            2,
            "Invalid value for '--workers': -1 is not in the range x>=0",
        ),
        (["pull", "labels", "out", "--workers", "-1"], 2, "Invalid value for '--workers': -1 is not in the range x>=0"),
        (["push", "labels", "out", "--workers", "-1"], 2, "Invalid value for '--workers': -1 is not in the range x>=0"),
        (["push", "labels", "s3://"], 1, "s3:// names no place; give the whole address, such as s3://bucket/labels"),
        (["push", "labels"], 2, "Missing argument 'URL'"),
        (["pul"], 2, "No such command 'pul'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_goes_wrong_is_one_line(labels, tmp_path, capsys, words, code, text):
    before = files(tmp_path)
    found, _, err = call(capsys, *words)
    assert found == code and text in err
    assert files(tmp_path) == before


def test_the_card_says_how_to_read_the_set(tmp_path):
    """Its snippets run as they stand, in the set's own folder."""
    for container in ("zarr", "webdataset"):
        write_set(tmp_path / container, make_spec(samples=5, container=container), 2)
        text = (tmp_path / container / "README.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["license"] == "apache-2.0" and container in head["tags"]
        snippets = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
        assert len(snippets) == 2
        subprocess.run([sys.executable, "-c", "".join(snippets)], cwd=tmp_path / container, check=True, timeout=60)
    hostile = make_spec(
        labeler={"architecture": 'a"\n---\nx: y', "weights_sha256": "0", "licence": "Ours: |\n# not yours"}
    )
    write_set(tmp_path / "hostile", hostile, 1)
    head = yaml.safe_load((tmp_path / "hostile" / "README.md").read_text().split("\n---\n")[0].removeprefix("---\n"))
    assert head["license"] == "other" and head["license_name"] == "Ours: |\n# not yours"
    assert head.keys() == {"license", "license_name", "pretty_name", "task_categories", "size_categories", "tags"}


@pytest.mark.parametrize(
    "words",
    [
        ("--data", "nowhere"),
        ("--labeler", "nowhere"),
        ("--key-prefix", "a=b"),
        ("--tolerance", "0.1"),
        ("--seed", "0"),
        ("--device", "cpu"),
        ("--skip-broken",),
        ("--data", "nowhere", "--seed", "1"),
    ],
    ids=" ".join,
)
def test_options_of_recompute_need_it(labels, words, capsys):
    code, out, err = call(capsys, "verify", "labels", *words)
    assert code == 2 and not out
    assert all(word in err for word in words if word.startswith("--")) and "--recompute N" in err
