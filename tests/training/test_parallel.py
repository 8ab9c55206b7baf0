"""Several processes: the same losses as one with their joint batch, an end for all where one fails, and going on."""

import json
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.evaluation import evaluate
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student
from tests.training.torchrun import torchrun

# Equal but for rounding: single batch, dropping nothing, mixing nothing (each process mixes its own images).
LOSSES = ("loss", "class_loss", "token_loss", "token_accuracy", "confidence", "labelled")


def log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def labels(stripes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    run = {"data": str(stripes[0]), "workers": 1, "device": "cpu"}
    train_labeler(LabelerConfig(out=str(folder / "labeler"), img_size=32, epochs=1, batch_size=15, **run))
    dump_labels(DumpConfig(out=str(folder / "set"), labeler=str(folder / "labeler"), shards=1, top_k=2, **run))
    return str(folder / "set")


def command(quick, labels, out, *more):
    words = ["train-student", "--labels", labels, "--out", out, "--sync-bn", *more]
    for name in ("data", "val", "img_size", "epochs", "seed", "workers", "device", "amp"):
        option = f"--{name.replace('_', '-')}"
        words += [] if option in more else [option, quick[name]]
    return words


@pytest.mark.parametrize("repeats", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_learn_as_one_with_their_joint_batch(quick, labels, tmp_path, repeats):
    """45 images in steps of 20, 20 and 5, so that the processes' last batches differ; 18 to measure on. With two crops
    of an image in a batch, 23 and 22 images in steps of 10, 10 and the rest."""
    one = StudentConfig(**quick | {"labels": labels, "residual": "ignore", "min_confidence": 0.3, "repeats": repeats})
    train_student(one)
    more = ("--batch-size", 10, "--min-confidence", 0.3, "--repeats", repeats)
    job = torchrun(*command(quick, labels, tmp_path / "two", *more))
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    assert said.count("student: ") == 1
    for alone, together in zip(log(one.out), log(tmp_path / "two"), strict=True):
        assert 0 < alone["labelled"] < 1
        for name in LOSSES:
            assert together[name] == pytest.approx(alone[name], rel=1e-3), name
        assert together["top1"] == pytest.approx(alone["top1"], abs=1.01 / 18)


def test_what_is_measured_is_what_is_saved(quick, labels, tmp_path):
    """Without --sync-bn each process's batch norms, and averages of them, have seen other images."""
    words = command(quick, labels, tmp_path / "run", "--batch-size", 5)
    words.remove("--sync-bn")
    job = torchrun(*words, fault="other")
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 0, said
    (entry,) = log(tmp_path / "run")[-1:]
    scores = evaluate(
        EvaluateConfig(data=quick["val"], checkpoint=str(tmp_path / "run"), batch_size=9, workers=1, device="cpu")
    )
    assert (scores["top1"], scores["token_top1"]) == (entry["top1"], entry["token_top1"])


def test_one_that_fails_ends_all(quick, labels, tmp_path):
    started = time.monotonic()
    job = torchrun(*command(quick, labels, tmp_path / "run", "--batch-size", 5), fault="memory")
    said, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "out of memory" in said
    # The other is told by its broken connection, or by torchrun, whichever is quicker.
    assert "another process of this job has failed" in said or "interrupted" in said
    assert time.monotonic() - started < 150
    assert not (tmp_path / "run" / "summary.json").exists()


def test_processes_with_other_settings_stop(quick, labels, tmp_path):
    job = torchrun(*command(quick, labels, tmp_path / "run", "--batch-size", 5), fault="settings")
    said, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "the processes of this job have other settings, images or labels than each other" in said
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_a_loss_that_is_not_finite_in_one_process_stops_all(quick, labels, tmp_path):
    run = tmp_path / "run"
    job = torchrun(*command(quick, labels, run, "--batch-size", 5), fault="nan")
    said, _ = job.communicate(timeout=200)
    assert job.returncode != 0
    assert "the loss is nan at epoch 1, step 3" in said
    evidence = json.loads((run / "not-finite-rank1.json").read_text())
    assert len(evidence["sample_ids"]) == 5
    assert not (run / "not-finite-rank0.json").exists()
    assert not (run / "weights.safetensors").exists()


@pytest.mark.slow
def test_a_job_that_is_asked_to_stop_goes_on_to_the_same_weights(quick, labels, tmp_path):
    more = ("--batch-size", 5, "--log-every", 1, "--epochs", 6)
    whole = torchrun(*command(quick, labels, tmp_path / "whole", *more))
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    job = torchrun(*command(quick, labels, tmp_path / "stopped", *more))
    steps = tmp_path / "stopped" / "steps.jsonl"
    deadline = time.monotonic() + 200
    while not (steps.exists() and len(steps.read_text().splitlines()) >= 7) and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=200)
    assert job.returncode != 0
    assert (tmp_path / "stopped" / "state.pt").exists()
    blind = torchrun(*command(quick, labels, tmp_path / "stopped", *more), fault="blind")
    said, _ = blind.communicate(timeout=200)
    assert blind.returncode != 0
    assert "the processes of this job find different states" in said
    again = torchrun(*command(quick, labels, tmp_path / "stopped", *more))
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    ours, theirs = (safetensors.torch.load_file(tmp_path / run / "weights.safetensors") for run in ("whole", "stopped"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
