"""``--dry-run``: it says what a run would be, and leaves nothing behind."""

import os
from pathlib import Path

import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.errors import StlError
from stl_offline.training.dry_run import dry_run
from stl_offline.training.optimization import TrainStep
from stl_offline.training.step_timer import SavedBytes
from stl_offline.training.train_labeler import train_labeler


def tree(folder):
    return sorted((path, path.stat().st_mtime_ns) for path in Path(folder).rglob("*"))


def test_it_prints_and_writes_nothing(quick, stripes, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path), tree(stripes[0])
    line = ["train-labeler", "--recipe", "fan-micro", "--dry-run", "--data", stripes[0], "--val", stripes[1]]
    line += ["--out", tmp_path / "run", "--img-size", "32", "--epochs", "10", "--batch-size", "20", "--device", "cpu"]
    assert main([str(word) for word in line]) == 0
    out = capsys.readouterr().out
    assert (tree(tmp_path), tree(stripes[0])) == before
    assert not os.listdir(tmp_path)
    shown = {words[0]: " ".join(words[1:]) for words in (line.split() for line in out.splitlines()) if words}
    assert shown["epochs"] == "10"
    assert shown["warmup_epochs"] == "2.0"  # the recipe's
    assert shown["data"].startswith("45 images")
    assert shown["steps"].startswith("30 (3 per epoch, the first 6 of them warm-up)")
    assert "4×4 tokens" in shown["model"]


def test_the_numbers_are_the_runs_own(quick):
    config = LabelerConfig(**quick | {"accumulate": 2, "batch_size": 10, "lr": 1e-3, "lr_batch": 40})
    found = dry_run(config, "labeler")
    summary = train_labeler(config)
    assert found.steps == summary["steps"] == 6
    assert found.step_images == 20
    assert found.lr == pytest.approx(5e-4)
    weights = Path(quick["out"]) / "weights.safetensors"
    assert 4 * found.parameters < weights.stat().st_size < 4.2 * found.parameters + 20_000
    assert found.memory > 5 * 4 * found.parameters
    assert found.seconds > 0


def test_saved_bytes_are_what_backward_needs():
    """A product keeps both factors, a sigmoid its result; the same memory counts once, parameters not at all."""
    weight = torch.randn(30, 20, requires_grad=True)
    values = torch.randn(50, 30)
    with SavedBytes([weight]) as counted:
        product = values @ weight
        result = product.sigmoid()
        again = values * weight.sum()
    assert counted.bytes >= 4 * (50 * 30 + 50 * 20)
    assert counted.bytes <= 4 * (50 * 30 + 50 * 20 + 16)
    (result.sum() + again.sum()).backward()
    assert weight.grad is not None


def test_mistakes_come_before_any_step(quick, tmp_path, make_stripes):
    with pytest.raises(StlError, match="nowhere"):
        dry_run(LabelerConfig(**quick | {"data": str(tmp_path / "nowhere")}), "labeler")
    with pytest.raises(StlError, match="label set"):
        dry_run(StudentConfig(**quick | {"labels": str(tmp_path)}), "student")
    train_labeler(LabelerConfig(**quick | {"epochs": 1}))
    with pytest.raises(StlError, match="holds a run with other settings .epochs: 1 → 2"):
        dry_run(LabelerConfig(**quick), "labeler")
    assert dry_run(LabelerConfig(**quick | {"resume": False}), "labeler").steps == 6
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StlError, match="is not empty and holds no run"):
        dry_run(LabelerConfig(**quick | {"out": str(tmp_path)}), "labeler")
    few = make_stripes(tmp_path / "few", 1, 4, ("diagonal", "vertical"))
    with pytest.raises(StlError, match="classes of the labeler"):
        online = {
            "data": str(few),
            "val": None,
            "labels": "online",
            "labeler": quick["out"],
            "out": str(tmp_path / "x"),
        }
        dry_run(StudentConfig(**quick | online), "student")


def test_a_steps_images_are_all_held(quick):
    one, four = (dry_run(LabelerConfig(**quick | {"accumulate": count, "amp": "auto"}), "labeler") for count in (1, 4))
    images = 3 * 20 * 3 * 32 * 32 * 4  # those of three batches more
    assert four.memory - one.memory == pytest.approx(2 * images, rel=0.1)
    assert (one.settings["device"], one.settings["workers"], one.settings["color_jitter"]) == ("cpu", 1, 0.4)
    assert one.settings["amp"] in ("none", "bf16")


@pytest.mark.parametrize(("kind", "residual", "targets"), [("soft", "ignore", 3), ("gumbel", "ghost", 4)])
def test_it_takes_the_runs_own_steps(quick, tmp_path, monkeypatch, kind, residual, targets):
    """With mixing, strong augmentation, half precision and labels of a set, of which no image is read."""
    train_labeler(LabelerConfig(**quick | {"epochs": 1}))
    dump_labels(
        DumpConfig(
            data=quick["data"], labeler=quick["out"], out=str(tmp_path / "set"), workers=1, device="cpu", top_k=2
        )
    )
    steps = []
    original = TrainStep.__call__

    def take(self, batch, *arguments):
        steps.append(batch.token_ids.shape)
        return original(self, batch, *arguments)

    monkeypatch.setattr(TrainStep, "__call__", take)
    more = {
        "labels": str(tmp_path / "set"),
        "token_target": kind,
        "residual": residual,
        "out": str(tmp_path / "student"),
    }
    more |= {"soft_classes": 3} if kind == "soft" else {}
    strong = {"mixup": 0.8, "cutmix": 1.0, "auto_augment": "rand-m9-mstd0.5-inc1", "random_erase": 0.3, "amp": "bf16"}
    found = dry_run(StudentConfig(**quick | more | strong | {"compile": True, "accumulate": 2}), "student")
    assert found.settings["compile"] is True
    assert found.step_images == 40
    assert {shape[1:] for shape in steps} == {(16, targets)}
    assert max(shape[0] for shape in steps) == 20
    assert not (tmp_path / "student").exists()
    # 45 maps of 4 × 4 tokens: two classes (2 B) with probabilities (4 B) and a confidence each; a view, and a flag.
    assert found.cache == 45 * (16 * (2 * 6 + 4) + 25)
    assert "disk        0.00 GB of token cache at most" in found.lines()
