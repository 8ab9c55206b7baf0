"""The report of runs: results, curves, what differs, labels, and examples from a model's own predictions."""

import json
import re

import numpy as np
import pytest
import timm
import torch

from stl_offline.cli.main import main
from stl_offline.config import EvaluateConfig, ReportConfig
from stl_offline.errors import InputError, JoinError
from stl_offline.evaluation import evaluate
from stl_offline.models import ModelDescription, load_model, save_model
from stl_offline.reports.predictions import choose_examples, predict
from stl_offline.reports.report import report_runs
from stl_offline.reports.runs import read_runs

MODEL = "fan_micro_4_p8_token"


def add_weights(folder, images, seed=0):
    """Weights of a model that was never trained."""
    names = tuple(sorted(path.name for path in images.iterdir()))
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, num_classes=len(names), img_size=32)
    # Untrained heads start near zero; larger ones say something.
    for name, parameter in model.named_parameters():
        if "head" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(seed))
    save_model(folder / "weights.safetensors", model.state_dict(), ModelDescription(MODEL, names, 32, "student"))
    return folder


def text_of(path) -> str:
    """What a page says, without its markup, data and scripts."""
    body = re.sub(r"<(script|style)\b.*?</\1>", " ", path.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body))


def test_runs_side_by_side(make_run, labels, label_set, tmp_path):
    dumped = {"labels": {"kind": "dumped", "fingerprint": label_set.fingerprint}}
    one = make_run("one", data=dumped)
    two = make_run("two", epochs=2, done=False, lr=0.002)
    out = tmp_path / "report.html"
    report = report_runs(ReportConfig(runs=(str(one), str(two)), labels=(str(labels),), out=str(out)))
    assert report.warnings == ("two is unfinished, 2 of 3 epochs",)
    text = text_of(out)
    assert "60.00% (best)" in text and "40.00%" in text
    assert "2 of 3" in text
    assert re.search(r"lr 0\.001 0\.002", text)
    assert "synthetic (Apache-2.0)" in text  # the label set's labeler, by its fingerprint
    assert "the token head was not trained" in text
    for title in ("Loss", "Top-1", "Learning rate", "Throughput"):
        assert f"{title} " in text
    page = out.read_text()
    assert page.count('role="img"') == 4 and "loss (nats)" in page and "images / s" in page
    assert "Examples None: the report was made without images" in text


def test_a_label_set_that_no_run_used_is_named(make_run, labels, tmp_path):
    out = tmp_path / "report.html"
    report = report_runs(ReportConfig(runs=(str(make_run("one")),), labels=(str(labels),), out=str(out)))
    assert report.warnings == (f"{labels}: none of the runs was trained on it",)


def test_a_run_that_learned_from_two_label_sets(make_run, labels, label_set, tmp_path):
    dumped = {"labels": {"kind": "dumped", "fingerprints": ["a" * 64, label_set.fingerprint]}}
    out = tmp_path / "report.html"
    run = make_run("two", data=dumped)
    report_runs(ReportConfig(runs=(str(run),), labels=(str(labels),), out=str(out)))
    text = text_of(out)
    assert f"set 1: fingerprint {'a' * 64}" in text
    assert "set 2: labeler synthetic (Apache-2.0)" in text


def test_one_run_shows_all_its_settings(make_run, tmp_path):
    out = tmp_path / "report.html"
    report_runs(ReportConfig(runs=(str(make_run("one")),), out=str(out)))
    text = text_of(out)
    assert "Settings that differ" not in text
    assert "token_weight 1.0" in text and "(best)" not in text


def test_a_run_without_an_epoch_is_shown_nevertheless(make_run, tmp_path):
    folder = make_run("early", epochs=0, done=False)
    (folder / "log.jsonl").unlink()
    report = report_runs(ReportConfig(runs=(str(folder),), out=str(tmp_path / "report.html")))
    assert report.warnings == ("early: no epoch has finished yet", "early is unfinished, 0 of 3 epochs")
    assert "no curves to show" in text_of(tmp_path / "report.html")


@pytest.fixture
def run_with_weights(make_run, images):
    return add_weights(make_run("student"), images)


def test_predictions_are_the_models(run_with_weights, images):
    found = predict(read_runs([run_with_weights]), str(images), 1000, device="cpu", workers=1)
    scored = evaluate(EvaluateConfig(data=str(images), checkpoint=str(run_with_weights), device="cpu", workers=1))
    assert len(found.sample_ids) == scored["samples"] == 18
    assert found.runs[0].right.mean() == pytest.approx(scored["top1"])
    tokens = found.tokens(0, 4)
    assert tokens.grid == (4, 4)
    assert (np.diff(tokens.probabilities, axis=-1) <= 0).all()
    model, _ = load_model(run_with_weights)
    assert model.grid_size(32, 32) == tokens.grid


def test_examples(run_with_weights, make_run, images, tmp_path):
    other = add_weights(make_run("other"), images, seed=1)
    config = ReportConfig(
        runs=(str(run_with_weights), str(other)),
        data=str(images),
        out=str(tmp_path / "report.html"),
        examples=2,
        device="cpu",
        workers=1,
    )
    report = report_runs(config)
    text = text_of(config.out if hasattr(config.out, "read_text") else tmp_path / "report.html")
    predicted = predict(read_runs([run_with_weights]), str(images), 1000, device="cpu", workers=1).runs[0]
    right, wrong = choose_examples(predicted, 2, 0)
    assert predicted.right[right].all() and not predicted.right[wrong].any()
    assert report.examples == len(right) + len(wrong)
    assert text.count("✗") + text.count("✓") == 2 * report.examples
    assert "gets wrong" in text and "Tokens of" not in text  # alt texts are attributes
    small = report_runs(ReportConfig(**{**vars(config), "max_mb": 0.6 * report.bytes / 1e6}))
    assert small.examples < report.examples
    assert any("Fewer examples" in warning for warning in small.warnings)


def test_the_surest_mistakes_come_first(run_with_weights, images):
    predictions = predict(read_runs([run_with_weights]), str(images), 1000, device="cpu", workers=1).runs[0]
    _, wrong = choose_examples(predictions, 3, 0)
    assert (np.diff(predictions.confidence[wrong]) <= 0).all()
    others = np.setdiff1d(np.flatnonzero(~predictions.right), wrong)
    assert predictions.confidence[wrong].min() >= predictions.confidence[others].max()


def test_images_of_other_classes_are_refused(run_with_weights, images, tmp_path):
    names = [path.name for path in images.iterdir()]
    (tmp_path / "other").mkdir()
    for name in (names[0], "zebra"):
        (tmp_path / "other" / name).symlink_to(images / names[0])
    config = ReportConfig(runs=(str(run_with_weights),), data=str(tmp_path / "other"), out=str(tmp_path / "x.html"))
    with pytest.raises(JoinError, match="zebra"):
        report_runs(config)


def test_the_command(make_run, tmp_path, capsys):
    out = tmp_path / "report.html"
    assert main(["report", str(make_run("one")), "--out", str(out)]) == 0
    assert f"page: {out}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(out)]) == 1
    assert "is not a run" in capsys.readouterr().err
    assert main(["report", "--out", str(out)]) == 2


def test_a_page_too_large_without_examples(make_run, tmp_path):
    with pytest.raises(InputError, match="increase `max_mb`"):
        report_runs(ReportConfig(runs=(str(make_run("one")),), out=str(tmp_path / "x.html"), max_mb=0.001))


def test_what_is_measured_every_few_epochs_is_one_line(make_run):
    """An epoch without validation is no gap; a value that is not finite is one."""
    folder = make_run("sparse", epochs=6)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for entry in lines:
        if entry["epoch"] % 2:
            del entry["top1"]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (run,) = read_runs([folder])
    assert run.measured("top1") == ((2.0, 0.4), (4.0, 0.8), (6.0, pytest.approx(1.2)))
    assert [epoch for epoch, _ in run.measured("loss")] == [1, 2, 3, 4, 5, 6]
