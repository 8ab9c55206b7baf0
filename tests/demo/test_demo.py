"""The demo's way through all stages to its pages; training itself has tests of its own."""

import json
import re
from pathlib import Path

import pytest
import timm
import torch

from stl_offline.demo import demo
from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set
from stl_offline.models import ModelDescription, save_model

MODEL = "fan_micro_4_p8_token"


def leave_untrained(config) -> dict[str, float]:
    """A run with its files, and a model as it is before the first step."""
    folder = Path(config.out)
    folder.mkdir(parents=True)
    names = tuple(sorted(path.name for path in Path(config.data).iterdir()))
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=len(names), img_size=config.img_size)
    stage = "student" if hasattr(config, "labels") else "labeler"
    save_model(folder / "weights.safetensors", model.state_dict(), ModelDescription(MODEL, names, 64, stage))
    settings = {"stage": stage, "settings": {"epochs": config.epochs, "model": config.model}}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "log.jsonl").write_text('{"epoch": 1, "loss": 2.5, "top1": 0.1, "seconds": 3.0}\n')
    (folder / "summary.json").write_text('{"epochs": 1, "loss": 2.5, "top1": 0.1}')
    return {"top1": 0.1, "token_top1": 0.2}


def check_pages(text: str, out: Path) -> None:
    pages = re.findall(r"^look at: (.*)$", text, re.MULTILINE)
    assert pages == [str(out / "labels.html"), str(out / "report.html")]
    labels, report = (Path(page).read_text() for page in pages)
    assert labels.count("<article ") == 8
    assert "images, from all shards" in labels
    for name in ("student", "student-without-labels", "labeler"):
        assert f">{name}</span>" in report
    assert report.count("<article ") > 0
    assert (out / "labels.png").is_file() and (out / "confidence.png").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["auroc"] < 1 and "contrast" in summary
    stages = [row["stage"] for row in summary["stages"]]
    assert stages == ["images", "labeler", "labels", "student", "student without labels"]


def test_the_demo_ends_with_both_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train_labeler", leave_untrained)
    monkeypatch.setattr(demo, "train_student", leave_untrained)
    out = tmp_path / "demo"
    text = demo.run_demo(out, train=20, val=10, epochs=1, labeler_epochs=1, shards=2, device="cpu", workers=1)
    check_pages(text, out)


def test_the_demo_stores_draws_where_they_are_asked_for(tmp_path, monkeypatch):
    asked = []

    def stop(config):
        asked.append(config)
        raise InterruptedError

    monkeypatch.setattr(demo, "train_labeler", leave_untrained)
    monkeypatch.setattr(demo, "dump_labels", stop)
    for draws in (0, 3):
        with pytest.raises(InterruptedError):
            demo.run_demo(tmp_path / str(draws), train=20, val=10, draws=draws, device="cpu", workers=1)
    assert [(config.draws, config.top_k) for config in asked] == [(0, None), (3, 0)]
    with pytest.raises(InputError, match="draws"):
        demo.run_demo(tmp_path / "no", draws=-1)
    assert not (tmp_path / "no").exists()


def test_the_demo_checks_its_settings_first(tmp_path):
    with pytest.raises(InputError, match="`epochs` must be at least 1"):
        demo.run_demo(tmp_path / "no", epochs=0)
    assert not (tmp_path / "no").exists()


def test_the_demo_advises_nothing_that_it_lacks(tmp_path, monkeypatch):
    """A run of other settings can be begun anew by its own command, but not by the demo's."""
    settings = {"train": 20, "val": 10, "epochs": 1, "shards": 2, "device": "cpu", "workers": 1}
    monkeypatch.setattr(demo, "dump_labels", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demo.run_demo(tmp_path / "demo", labeler_epochs=1, **settings)
    with pytest.raises(InputError, match=r"\(epochs: 1 → 2\); choose another `out`, or remove this one$"):
        demo.run_demo(tmp_path / "demo", labeler_epochs=2, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("draws", [0, 3])
def test_a_small_demo(tmp_path, draws):
    out = tmp_path / "demo"
    small = {"train": 60, "val": 30, "epochs": 1, "labeler_epochs": 1, "shards": 2, "device": "cpu", "workers": 1}
    check_pages(demo.run_demo(out, **small, draws=draws), out)
    assert open_label_set(out / "labels").spec.draws == draws
    assert ("share of 3 draws" in (out / "labels.html").read_text()) == (draws == 3)
