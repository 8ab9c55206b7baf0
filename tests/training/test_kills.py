"""Real processes, real signals: the same command goes on and ends with the same weights, bit for bit."""

import json
import signal
import time

import pytest
import safetensors.torch
import torch

from stl_offline.cli.main import main
from tests.forks import COMMAND_LINE, Fork


@pytest.fixture
def words(quick):
    options = quick | {"epochs": 4, "batch_size": 5, "mixup": 0.8, "drop_path": 0.1}
    given = {name: value for name, value in options.items() if name != "out"}
    return [str(word) for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]


def steps_of(run):
    path = run / "steps.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def start(words, out, folder, *more):
    return Fork(COMMAND_LINE, "train-labeler", *words, "--out", out, "--log-every", 1, *more, folder=folder)


def finish(process):
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error


@pytest.mark.parametrize(
    ("number", "code", "more"),
    [
        (signal.SIGKILL, -9, ("--checkpoint-steps", "3")),
        pytest.param(signal.SIGTERM, 143, (), marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, (), marks=pytest.mark.slow),
    ],
)
def test_killed_in_an_epoch_it_ends_with_the_same_weights(words, tmp_path, number, code, more):
    """36 steps; killed after the fifth at the earliest, which SIGKILL throws back to the third; on from elsewhere."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    (tmp_path / "elsewhere").mkdir()
    # Forks share the order of sets and dicts of strings with each other, not with this process.
    assert main(["train-labeler", *words, "--out", str(whole)]) == 0
    process = start(words, killed, tmp_path, *more)
    deadline = time.monotonic() + 120
    while len(steps_of(killed)) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert (killed / "state.pt").exists()
    taken = torch.load(killed / "state.pt", weights_only=True)["at"]["step"]
    reached = steps_of(killed)[-1]
    assert 0 <= reached - taken <= 4 if more else taken >= reached
    assert taken < 36
    finish(start(words, killed, tmp_path / "elsewhere", *more))
    assert steps_of(killed) == list(range(1, 37))
    ours, theirs = (safetensors.torch.load_file(run / "weights.safetensors") for run in (whole, killed))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert json.loads((killed / "summary.json").read_text())["steps"] == 36
