"""What fuzzing found in readers, each with the right answer."""

import json

import pytest

from stl_offline.config import StudentConfig
from stl_offline.errors import FormatError, InputError
from stl_offline.recipes import read_recipe
from stl_offline.reports.runs import read_runs
from stl_offline.training.run_folder import RunFolder

DEEP = b"[" * 100_000
HUGE = b"1" + b"0" * 400


@pytest.fixture
def run(tmp_path):
    folder = RunFolder(tmp_path / "run", "student", {"epochs": 3}, {"images": "a"})
    with folder.held():
        folder.open(resume=True, write=True)
    (tmp_path / "run" / "summary.json").write_bytes(b"{}")
    return folder


@pytest.mark.parametrize("epochs", [HUGE, b'"x"', b"[]", b"null", b"true", b"Infinity"])
def test_epochs_that_are_no_number_count_as_none(run, epochs):
    (run.path / "config.json").write_bytes(b'{"settings": {"epochs": %s}}' % epochs)
    assert read_runs([run.path])[0].epochs == 0


@pytest.mark.parametrize("line", [DEEP, b'{"epoch": %s}' % HUGE, b'{"epoch": Infinity}', b'{"epoch": "NaN"}'])
def test_log_lines_that_cannot_be_read_are_noted(run, line):
    (run.path / "log.jsonl").write_bytes(b'{"epoch": 0, "top1": %s}\n' % HUGE + line)
    found = read_runs([run.path])[0]
    assert found.points("top1") == ((0.0, None),)
    assert found.notes == ("1 lines of log.jsonl are broken and were skipped (line 2)",)


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
def test_json_nested_for_ever_is_damage(run, name):
    (run.path / name).write_bytes(DEEP)
    for read in (lambda: read_runs([run.path]), run.summary):
        with pytest.raises(FormatError, match=f"{name} is damaged"):
            read()


@pytest.mark.parametrize("part", [None, 3, "x", []])
def test_settings_that_are_no_object_are_damage(run, part):
    config = json.loads((run.path / "config.json").read_bytes()) | {"settings": part}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"config.json is damaged \(settings is no JSON object\); .*`resume=False`"):
        run.look(True)


def test_a_recipe_of_many_bytes_is_not_parsed(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"lr: [" + b"1, " * 20_000 + b"1]")
    with pytest.raises(InputError, match="more than 32,768 bytes"):
        read_recipe(StudentConfig, str(tmp_path / "r.yaml"))


def test_a_recipe_number_of_hundreds_of_digits(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"lr: " + HUGE)
    with pytest.raises(InputError, match="lr"):
        read_recipe(StudentConfig, str(tmp_path / "r.yaml"))
