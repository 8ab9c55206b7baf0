"""What is to run on a GPU, in its small form on the CPU: every line that can be, is run before there is one."""

import json
import sys

import pytest
import torch

from tests.gpu import absent, run
from tests.gpu.report import SMALL, Bench


def small(monkeypatch, tmp_path, *only):
    words = ["run", "--small", "--out", str(tmp_path / "out"), *(["--only", *only] if only else [])]
    monkeypatch.setattr(sys, "argv", words)
    run.main()
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "FAILED" in (row["row"], *row) or row.get("right") == "NO"]
    return rows


def test_the_quick_sections(monkeypatch, tmp_path):
    rows = small(monkeypatch, tmp_path, "losses", "evaluation", "augmentation", "dump")
    found = {row["section"] for row in rows}
    assert found >= {"Losses and targets", "Augmentation", "Evaluation", "Dump"}
    table = (tmp_path / "out" / "results.md").read_text()
    assert "## Dump\n" in table and "; right yes |" in table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_all_sections(monkeypatch, tmp_path):
    rows = small(monkeypatch, tmp_path)
    assert len({row["section"] for row in rows}) == 13


def test_a_section_that_fails_is_a_row_and_time_that_is_up_leaves_out(tmp_path):
    bench = Bench(tmp_path, torch.device("cpu"), SMALL, 60)

    def fail(bench):
        bench.add("first", value=1.23456)
        raise ValueError("a | b\nc")

    bench.run("fails", fail, 10)
    bench._end = 0.0
    bench.run("late", fail, 10)
    assert [row["row"] for row in bench.rows] == ["first", "FAILED", "took", "left out"]
    assert bench.rows[0]["value"] == 1.235
    table = (tmp_path / "results.md").read_text()
    assert "| FAILED | error ValueError: a / b c; place" in table
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_names_of_ffcv_stand_for_nothing_where_it_is_not_installed():
    finder = absent._Finder()
    assert finder.find_spec("torch") is None
    spec = finder.find_spec("ffcv.libffcv")
    module = type(sys)("ffcv.libffcv")
    spec.loader.exec_module(module)
    assert issubclass(type("Own", (module.Operation,), {}), module.Operation)
    assert module.lib.tjDecompress2() == -1
