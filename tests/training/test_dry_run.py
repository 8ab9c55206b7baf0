"""``--dry-run``: it says what a run would be, and leaves nothing behind."""

import os
from pathlib import Path

import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.errors import StlError
from stl_offline.training.dry_run import _SavedBytes, dry_run
from stl_offline.training.labeler import train_labeler


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
    assert shown["data"].startswith("45 pictures")
    assert shown["steps"].startswith("30 (3 an epoch, the first 6 of them warm-up)")
    assert "4×4 tokens" in shown["model"]


def test_the_numbers_are_the_runs_own(quick):
    config = LabelerConfig(**quick | {"accumulate": 2, "batch_size": 10, "lr": 1e-3, "lr_batch": 40})
    found = dry_run(config, "labeler")
    summary = train_labeler(config)
    assert found.steps == summary["steps"] == 6
    assert found.step_pictures == 20
    assert found.lr == pytest.approx(5e-4)
    weights = Path(quick["out"]) / "weights.safetensors"
    assert 4 * found.parameters < weights.stat().st_size < 4.2 * found.parameters + 20_000
    assert found.memory > 5 * 4 * found.parameters
    assert found.seconds > 0


def test_saved_bytes_are_what_backward_needs():
    """A product keeps both factors, a sigmoid its result; the same memory counts once, parameters not at all."""
    weight = torch.randn(30, 20, requires_grad=True)
    values = torch.randn(50, 30)
    with _SavedBytes([weight]) as counted:
        product = values @ weight
        result = product.sigmoid()
        again = values * weight.sum()
    assert counted.bytes >= 4 * (50 * 30 + 50 * 20)
    assert counted.bytes <= 4 * (50 * 30 + 50 * 20 + 16)
    (result.sum() + again.sum()).backward()
    assert weight.grad is not None


def test_mistakes_come_before_any_step(quick, tmp_path):
    with pytest.raises(StlError, match="nowhere"):
        dry_run(LabelerConfig(**quick | {"data": str(tmp_path / "nowhere")}), "labeler")
    with pytest.raises(StlError, match="label set"):
        dry_run(StudentConfig(**quick | {"labels": str(tmp_path)}), "student")
