"""What is to run on a GPU, in its small form on the CPU: every line that can be, is run before there is one."""

import io
import json
import sys
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resized_crop

from tests.gpu import absent, run
from tests.gpu.memory import MemoryImages
from tests.gpu.report import SMALL, Bench
from tests.gpu.study import DecodedLoader, Study


def small(monkeypatch, tmp_path, *only, more=()):
    words = ["run", "--small", "--out", str(tmp_path / "out"), *(["--sections", *only] if only else []), *more]
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
    assert len({row["section"] for row in rows}) == 15


def image_tars(folder):
    """Tars of 25 and 13 images of 6 classes."""
    draw = np.random.default_rng(0)
    tars = []
    for name, count in (("train", 25), ("val", 13)):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for number in range(count):
                add_image(archive, f"{name}/class{number % 6}/{number}.JPEG", draw.integers(0, 255, (64, 64, 3)))
        tars.append(str(folder / f"{name}.tar"))
    return tars


def add_image(archive, name, pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "PNG" if name.endswith("png") else "JPEG")
    member = tarfile.TarInfo(name)
    member.size = stream.tell()
    stream.seek(0)
    archive.addfile(member, stream)


@pytest.mark.slow
def test_the_study(monkeypatch, tmp_path):
    """Every arm, from a tar of images; then the same again, which finds all done."""
    tars = image_tars(tmp_path)
    rows = small(monkeypatch, tmp_path, "study", more=("--study", *tars))
    found = {row["row"] for row in rows}
    assert found >= {"labeler", "labels-draws", "labels-top5", "none", "online", "draws", "top5", "draws − online"}
    assert found >= {"larger-labeler", "larger-labels-draws", "larger-online", "larger-draws − larger-none"}
    settings = {
        "epochs": 2,
        "larger_epochs": 2,
        "seeds": 2,
        "batch_size": 8,
        "student_batch": 8,
        "views": 1,
        "jobs": 0,
        "device": "cpu",
    }
    study = Study(*tars, str(tmp_path / "out" / "study"), **settings)
    monkeypatch.setattr(Study, "_train", None)
    study.run_all()
    assert len(study.rows()) == len([row for row in rows if row["section"] == "Study"]) - 1


@pytest.mark.slow
def test_students_of_the_study_are_fine_tuned_on_masks(tmp_path):
    draw, tars, masks = np.random.default_rng(0), image_tars(tmp_path), str(tmp_path / "masks.tar")
    with tarfile.open(masks, "w") as archive:
        for name in ("train/a", "train/b", "val/c"):
            add_image(archive, f"{name}.jpg", draw.integers(0, 255, (72, 80, 3)))
            add_image(archive, f"{name}.png", draw.integers(0, 11, (72, 80)))
    settings = {"larger": "", "epochs": 1, "batch_size": 8, "student_batch": 8, "jobs": 2, "seeds": 1, "device": "cpu"}
    settings |= {"masks": masks, "masks_epochs": 1, "names": "masks-none,masks-r"}
    study = Study(*tars, str(tmp_path / "out"), **settings)
    study.run_all()
    assert {path.stem for path in (tmp_path / "out" / "results").iterdir()} == set(study.wanted)
    scores = study.result("masks-none-seed0")
    assert 0 < scores["miou"] < 0.2 and "corrupted_miou" in scores
    assert [line.split(" | ")[0] for line in study.tables()[2:]] == ["| random", "| none"]


def test_the_study_keeps_its_settings_and_runs_what_is_named(tmp_path):
    study = Study("train.tar", "val.tar", str(tmp_path), seeds=2)
    study.keep_settings()
    replace(study, seeds=3, jobs=1, minutes=1.0, names="none").keep_settings()
    with pytest.raises(ValueError, match="other settings: larger_epochs 20; choose another --out"):
        replace(study, larger_epochs=9).keep_settings()
    replace(study, masks="masks.tar").keep_settings()
    with pytest.raises(ValueError, match="other settings: masks_epochs 18; choose another --out"):
        replace(study, masks="masks.tar", masks_epochs=9).keep_settings()
    assert list(study.wanted) == list(study.tasks)
    for names in ("none,", "larger-top5", "masks-none"):
        with pytest.raises(ValueError, match="no task has a name with"):
            replace(study, names=names).run_all()
    wanted = replace(study, names="larger-draws,top5-seed1").wanted
    assert list(wanted) == [
        "labeler",
        "labels-top5",
        "larger-labeler",
        "larger-labels-draws",
        "larger-draws-seed0",
        "larger-draws-seed1",
        "top5-seed1",
    ]


@pytest.mark.parametrize("flip", [False, True])
def test_crops_in_memory_are_torchvisions(flip):
    images = MemoryImages(3, 40, 1)
    images.pixels = np.random.default_rng(0).integers(0, 255, (3, 3, 40, 40), dtype=np.uint8)
    device = torch.device("cpu")
    loader = DecodedLoader(images, 24, 3, device, ((0.5,) * 3, (0.25,) * 3), shuffle=False)
    left, top, width, height = 5, 8, 20, 12
    view = np.array([width, 0, left, 0, height, top]) / 40
    if flip:
        view[[0, 2]] = -view[0], view[0] + view[2]
    (batch,) = loader.epoch(0, np.tile(view.astype(np.float32), (3, 1)))
    pixels = torch.from_numpy(images.pixels).float() / 255
    expected = resized_crop(pixels, top, left, height, width, [24, 24], antialias=False)
    expected = (expected.flip(-1) if flip else expected) * 4 - 2
    # At the crop's edge the one reads on in the image, and the other repeats the edge.
    assert torch.allclose(batch.images[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2], atol=1e-5)


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
