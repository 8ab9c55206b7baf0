"""The study's plan, its running of tasks side by side, and its arithmetic; the study itself is run by hand."""

import json
import subprocess
import sys
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from stl_offline.config import DumpConfig, StudentConfig
from stl_offline.evaluation import corrupt
from tests.source_tree import REPOSITORY


@pytest.fixture(scope="module")
def study():
    """The study's modules, which import each other as scripts do."""
    pytest.importorskip("imagecorruptions")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPOSITORY / "tests" / "benchmarks"))
        import study
        import study_plan
        import study_tables

        assert [len(kinds) for kinds in study_tables.KINDS.values()] == [3, 4, 4, 4]
        yield study, study_plan, study_tables


@pytest.fixture
def settings(study):
    return study[1].Study("train", "val", "boxes", epochs=4, seeds=3, batch_size=10, corrupted_images=10)


def test_every_need_comes_before_what_needs_it(study, settings):
    tasks = study[1].make_tasks(settings)
    names = [task.name for task in tasks]
    assert len(set(names)) == len(names)
    for number, task in enumerate(tasks):
        assert set(task.needs) <= set(names[:number]), task.name
    for arm in ("none", "online", "whole", "views"):
        assert {f"{arm}-seed{seed}" for seed in range(3)} <= set(names)
    assert sum(task.kind == "student" for task in tasks) == 12 + len(study[1].MAPS.other)


@pytest.mark.parametrize(("labeler", "expected"), [("micro", "fan_micro_4_p8"), ("student", "vit_tiny")])
def test_a_labeler_can_have_the_students_model(study, settings, monkeypatch, tmp_path, labeler, expected):
    made = []
    monkeypatch.setattr(study[1], "train_labeler", lambda config: made.append(config) or {})
    monkeypatch.setattr(study[1], "_scores", lambda *_: {})
    settings = replace(settings, student="vit_tiny", student_lr=0.25, labeler=labeler)
    study[1]._labeler(settings, tmp_path, None)
    assert made[0].model == expected
    assert (made[0].lr == 0.25) == (labeler == "student")


@pytest.mark.parametrize("plan", ["maps", "draws"])
def test_the_settings_of_every_arm_and_set_are_valid(study, plan, settings):
    _, plans, _ = study
    plan = plans.PLANS[plan]
    for name, options in plan.sets.items():
        options = {key: 8 if isinstance(value, str) else value for key, value in options.items()}
        DumpConfig(data="x", labeler="x", out=name, **{"top_k": 5, "seed": 0} | options)
    for name, options in plan.arms.items():
        labeler = {"labeler": "x"} if options["labels"] == "online" else {}
        StudentConfig(data="x", out=name, **options | labeler)
        assert isinstance(options["labels"], str) or set(options["labels"]) <= set(plan.sets)
    assert {arm for pair in plan.differences for arm in pair} | {plan.against} <= set(plan.main)


def test_what_is_wanted_brings_what_it_needs(study, settings):
    tasks = study[1].make_tasks(settings)
    names = [task.name for task in study[0]._wanted(tasks, "views-seed1,boxes")]
    assert names == ["corrupted", "labeler", "labels-whole", "labels-whole-128", "labels-views", "views-seed1", "boxes"]


def test_tasks_run_as_their_needs_allow_and_go_on_where_they_stopped(study, tmp_path, monkeypatch, capsys):
    runner, plan, _ = study
    (tmp_path / "results").mkdir()
    tasks = [plan.Task("a", "x"), plan.Task("b", "x", ("a",)), plan.Task("bad", "x"), plan.Task("c", "x", ("bad",))]
    started = []

    def start(task, folder):
        started.append(task.name)
        assert all((folder / "results" / f"{need}.json").exists() for need in task.needs)
        write = f"open({str(folder / 'results' / task.name) + '.json'!r}, 'w').write('{{}}')"
        return subprocess.Popen([sys.executable, "-S", "-c", "raise SystemExit(3)" if task.name == "bad" else write])

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0.02)
    assert runner.run_all(tasks, tmp_path, jobs=2) == 1
    assert sorted(started) == ["a", "b", "bad"]
    said = capsys.readouterr().out
    assert "FAILED (3)" in said
    assert "not run: c" in said
    assert runner.run_all(tasks[:2], tmp_path, jobs=2) == 0
    assert sorted(started) == ["a", "b", "bad"]


def test_a_task_that_went_on_does_not_say_how_long_it_took(study, settings, tmp_path, monkeypatch):
    _, plan, tables = study
    monkeypatch.setitem(plan._DO, "dump", lambda *_: {"bytes": 1000, "samples": 10})
    task = plan.Task("labels-whole", "dump")
    plan.run_task(settings, tmp_path, task)
    assert plan.read_result(tmp_path, "labels-whole")["cpu_seconds"] >= 0
    assert tables._sets(tmp_path, plan.MAPS).endswith("| whole | 1,000 | 100 | 0 |")
    plan.run_task(settings, tmp_path, task)
    assert tables._sets(tmp_path, plan.MAPS).endswith("| whole | 1,000 | 100 | – |")


def result(top1, kinds, clean):
    return {
        "top1": top1,
        "top1_not_averaged": top1,
        "ece": 0.05 + top1 / 10,
        "train_cpu_seconds": 80.0,
        "corrupted": {"clean": clean, "kinds": kinds},
        "history": [{"epoch": 1, "class_loss": 2.0, "top1": 0.1}, {"epoch": 2, "class_loss": 1.0, "top1": top1}],
    }


def test_tables_hold_means_spreads_and_differences(study, settings, tmp_path):
    _, plan, tables = study
    kinds = {kind: [0.2, 0.4, 0.3] for family in tables.KINDS.values() for kind in family}
    (tmp_path / "results").mkdir()
    for arm, values in {
        "none": (0.5, 0.6, 0.7),
        "views": (0.65, 0.75, 0.7),
        "online": (0.8,),
        "whole": (0.6,),
        "zoom": (0.65,),
    }.items():
        for seed, value in enumerate(values):
            path = plan.result_path(tmp_path, f"{arm}-seed{seed}")
            path.write_text(json.dumps(result(value, kinds, 0.6)))
    tables.write_report(tmp_path, settings, tmp_path / "out")
    text = (tmp_path / "out" / "study.md").read_text()
    assert (
        "| `none`: no labels | 3 | 60.0 ± 10.0 | 60.0 ± 10.0 | 11.0 ± 1.0 | 30.0 ± 0.0 | 50.0 ± 0.0 | 20 | – |" in text
    )
    assert "| `zoom` | +5.0 | +0.5 | +0.0 |" in text
    # √((2 · 0.1² + 2 · 0.05²) / 4 · (1/3 + 1/3)) = 6.5 points
    assert (
        "| views − none | +10.0 (standard error 6.5) | +1.0 (standard error 0.6) | +0.0 (standard error 0.0) |" in text
    )
    # The spread of the others stands for that of a single run: √(0.00625 · (1 + 1/3)) = 9.1
    assert (
        "| online − none | +20.0 (standard error 9.1) | +2.0 (standard error 0.9) | +0.0 (standard error 0.0) |" in text
    )
    assert "| `none` | 10.0 | 50.0 | – | – |" in text
    kept = json.loads((tmp_path / "out" / "study-results.json").read_text())
    assert kept["settings"]["epochs"] == 4
    assert kept["results"]["views-seed1"]["top1"] == 0.75
    assert (tmp_path / "out" / "study-curves.png").stat().st_size > 5000
    assert (tmp_path / "out" / "study-corruptions.png").stat().st_size > 5000


def test_corrupted_images_are_those_that_evaluate_generates(study, tmp_path, monkeypatch):
    import study_corruptions

    monkeypatch.setattr(study_corruptions, "KINDS", {"weather": ("fog",), "digital": ("jpeg_compression",)})

    for name, shade in (("dark", 60), ("light", 200)):
        (tmp_path / "val" / name).mkdir(parents=True)
        Image.new("RGB", (64, 64), (shade, 90, shade // 2)).save(tmp_path / "val" / name / "0.png")
    folder = tmp_path / "corrupted"
    study_corruptions.make_corrupted(str(tmp_path / "val"), folder, 64, 2, seed=0)
    clean, fog = np.load(folder / "clean.npy"), np.load(folder / "fog.npy")
    assert len(list(folder.glob("*.npy"))) == 2 + 2 and fog.shape == (3, 2, 64, 64, 3)
    assert (fog[1, 1] == corrupt(clean[1], "fog", 3, seed=0, key="light/0.png")).all()

    class Bright(torch.nn.Module):  # tells the two by their shade
        pretrained_cfg: ClassVar = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

        def forward(self, images):
            shade = images[:, 0].mean(dim=(1, 2)) - 0.5
            return torch.stack([-shade, shade], dim=1), None

    found = study_corruptions.measure_corrupted(Bright(), ("dark", "light"), folder)
    assert found["clean"] == 1.0 and found["kinds"]["jpeg_compression"] == [1.0] * 3
    assert set(found["kinds"]) == {"fog", "jpeg_compression"}


def test_cells_in_a_box(study):
    from study_measures import _cells_inside

    cells = _cells_inside([0, 8, 15, 19], 64, (4, 8))  # 16 wide, rows 8 to 19; cells of 16 × 8 pixels
    assert cells.shape == (4, 8)
    assert cells[0].tolist() == [0.5, 0.5, 0, 0, 0, 0, 0, 0]
    assert cells[1].tolist() == [0.25, 0.25, 0, 0, 0, 0, 0, 0]
    assert cells[2:].sum() == 0
