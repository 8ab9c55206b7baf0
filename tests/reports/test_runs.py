"""Reading what training left behind: whole, unfinished, and damaged."""

import json

import pytest

from stl_offline.errors import FormatError, InputError
from stl_offline.reports.runs import number, read_runs, setting_rows


def test_a_finished_run(make_run):
    (run,) = read_runs([make_run("student")])
    assert (run.name, run.stage, run.status, run.notes) == ("student", "student", "finished", ())
    assert run.points("top1") == ((1.0, 0.2), (2.0, 0.4), (3.0, pytest.approx(0.6)))
    assert run.points("no such thing") == ((1.0, None), (2.0, None), (3.0, None))
    assert run.result("top1") == 0.6
    assert run.result("images_per_second") == 30.0  # only the log has it
    assert run.total("seconds") == 22.0


def test_an_unfinished_run_says_how_far_it_came(make_run):
    (run,) = read_runs([make_run("student", epochs=2, done=False)])
    assert run.status == "unfinished, 2 of 3 epochs"
    assert run.result("top1") == 0.4


def test_a_run_without_an_epoch(make_run):
    folder = make_run("student", epochs=0, done=False)
    (folder / "log.jsonl").unlink()
    (run,) = read_runs([folder])
    assert run.history == ()
    assert run.notes == ("no epoch has finished yet",)
    assert run.result("loss") is None


def test_broken_lines_are_left_out_and_named(make_run):
    folder = make_run("student")
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines()
    again = json.dumps({"epoch": 1, "loss": 9.0, "top1": float("nan")})
    log.write_text("\n".join([lines[0], "{cut of", "7", '{"loss": 1}', lines[2], "", again]))
    (run,) = read_runs([folder])
    assert [entry["epoch"] for entry in run.history] == [1, 3]
    assert run.points("loss")[0] == (1.0, 9.0)  # of two, the last
    assert run.points("top1")[0] == (1.0, None)
    assert "3 lines of log.jsonl are broken and were skipped (line 2, 3, 4)" in run.notes


def test_a_loss_that_was_not_finite_is_noted(make_run):
    folder = make_run("student", done=False)
    (folder / "not-finite.json").write_text("{}")
    (run,) = read_runs([folder])
    assert any("not finite" in note for note in run.notes)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_damaged_files_are_named(make_run, name, content):
    folder = make_run("student")
    (folder / name).write_bytes(content)
    with pytest.raises(FormatError, match=name):
        read_runs([folder])


def test_what_is_no_run_is_named(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    for place, words in ((tmp_path / "empty", "no config.json"), (tmp_path / "nowhere", "not a folder")):
        with pytest.raises(InputError, match=words):
            read_runs([place])
    run = make_run("student")
    with pytest.raises(InputError, match="twice"):
        read_runs([run, run / ".." / "student"])


def test_runs_of_one_name_are_told_apart(make_run):
    runs = read_runs([make_run("a/student"), make_run("b/student")])
    assert [run.name for run in runs] == ["a/student", "b/student"]


def test_settings_that_differ(make_run):
    one = make_run("one", data={"labels": {"kind": "dumped", "fingerprint": "f" * 64}}, flip=True, mean=[0.5, 1])
    two = make_run("two", lr=0.002, flip=False)
    differ, same = setting_rows(read_runs([one, two]))
    assert dict(differ) == {
        "flip": ["yes", "no"],
        "labels fingerprint": ["f" * 16 + "…", "–"],
        "labels kind": ["dumped", "none"],
        "lr": ["0.001", "0.002"],
        "mean": ["[0.5, 1]", "–"],
    }
    assert ("classes", "2") in same
    assert ("version of torch", "2.9") in same


@pytest.mark.parametrize(
    ("value", "expected"), [(3, 3.0), (True, None), ("3", None), (float("inf"), None), (None, None)]
)
def test_numbers(value, expected):
    assert number(value) == expected
