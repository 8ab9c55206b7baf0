"""Stage 1: it learns, describes itself, goes on where it stopped, and stops where it must."""

import json
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stl_offline import device
from stl_offline.config import LabelerConfig
from stl_offline.distributed import World
from stl_offline.errors import FormatError, InputError, JoinError, TargetError, TrainingError
from stl_offline.evaluation import evaluate_model, scoring
from stl_offline.images.pack import ensure_beton
from stl_offline.loader.order import shuffled
from stl_offline.models import load_model, read_description
from stl_offline.settings import differences
from stl_offline.training import run_folder
from stl_offline.training.engine import run_stage
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.setup import make_run_folder, prepare
from stl_offline.training.train_labeler import LabelerObjective, train_labeler
from tests.training.conftest import quick_settings


def weights(run):
    return safetensors.torch.load_file(Path(run) / "weights.safetensors")


def same_weights(a, b):
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def once(stripes, tmp_path_factory):
    """once(name, **more settings) → (folder, summary) of a run that is trained for the first who asks, to be copied."""
    runs = {}

    def train(name, **more):
        if name not in runs:
            folder = tmp_path_factory.mktemp("once") / "run"
            runs[name] = folder, train_labeler(LabelerConfig(**quick_settings(stripes, folder) | more))
        return runs[name]

    return train


@pytest.fixture
def done(quick, once):
    """A finished run with the settings of `quick`, in its folder; its summary."""
    folder, summary = once("done")
    shutil.copytree(folder, quick["out"])
    return summary


def test_learns_and_describes_itself(quick):
    summary = train_labeler(LabelerConfig(**quick | {"epochs": 30, "batch_size": 15, "ema_decay": 0.0}))
    run = Path(quick["out"])
    assert summary["top1"] > 0.6  # a third by chance
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == list(range(1, 31))
    assert log[-1]["loss"] < log[0]["loss"]
    config = json.loads((run / "config.json").read_text())
    assert config["settings"]["batch_size"] == 15
    assert config["data"]["class_names"] == ["diagonal", "horizontal", "vertical"]
    assert config["versions"]["torch"] == torch.__version__.split("+")[0] or config["versions"]["torch"]
    assert not (run / "state.pt").exists()
    model, description = load_model(run)
    assert description == read_description(run / "weights.safetensors")
    assert description.model == "fan_micro_4_p8_token"
    class_logits, token_logits = model.eval()(torch.zeros(1, 3, 32, 32))
    assert class_logits.shape == (1, 3)
    assert token_logits.shape == (1, 16, 3)


def test_same_command_again_changes_nothing(quick, done):
    before = {path.name: path.stat().st_mtime_ns for path in Path(quick["out"]).iterdir()}
    assert train_labeler(LabelerConfig(**quick)) == done | {"already_complete": True}
    assert {path.name: path.stat().st_mtime_ns for path in Path(quick["out"]).iterdir()} == before


@pytest.mark.parametrize(
    ("stop_at", "more"),
    [
        (1, {}),
        (2, {}),
        (3, {}),
        (4, {}),
        (2, {"amp": "fp16", "clip_grad": 1.0}),
        (5, {"batch_size": 10, "accumulate": 2}),
        (4, {"repeats": 2, "auto_augment": "rand-m9-p1"}),
    ],
)
def test_stopped_anywhere_it_ends_with_the_same_weights(quick, once, monkeypatch, stop_at, more):
    """SIGTERM in the middle of a step: the step ends, all is saved, and the same command takes the steps left."""
    more = {"mixup": 0.8, "cutmix": 1.0, "drop_path": 0.1} | more
    config = quick | more
    whole, _ = once(f"whole {more}", **more)
    steps = 0
    original = LabelerObjective.losses

    def step_and_stop(*arguments):
        nonlocal steps
        steps += 1
        if steps == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(LabelerObjective, "losses", step_and_stop)
    with pytest.raises(SystemExit) as stopped:
        train_labeler(LabelerConfig(**config))
    assert stopped.value.code == 143
    parts = config.get("accumulate", 1)
    assert steps == -(-stop_at // parts) * parts
    monkeypatch.setattr(LabelerObjective, "losses", original)
    train_labeler(LabelerConfig(**config))
    assert same_weights(whole, config["out"])
    best = [safetensors.torch.load_file(Path(run) / "best.safetensors") for run in (whole, config["out"])]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[0])
    lines = (Path(config["out"]) / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


def test_stopped_while_it_measures_it_repeats_no_step(quick, once, monkeypatch):
    """The state is stored before: the same command only measures again, and ends with the same weights and lines."""
    whole, _ = once("done")
    measured = 0
    original = evaluate_model

    def ask_and_measure(*arguments, **settings):
        nonlocal measured
        measured += 1
        if measured == 2:  # of the first epoch: the plain weights, after the averaged ones
            signal.raise_signal(signal.SIGINT)
        return original(*arguments, **settings)

    monkeypatch.setattr(scoring, "evaluate_model", ask_and_measure)
    with pytest.raises(KeyboardInterrupt):
        train_labeler(LabelerConfig(**quick))
    assert measured == 2
    assert not (Path(quick["out"]) / "log.jsonl").exists()
    steps = 0
    losses = LabelerObjective.losses

    def count(*arguments):
        nonlocal steps
        steps += 1
        return losses(*arguments)

    monkeypatch.setattr(LabelerObjective, "losses", count)
    train_labeler(LabelerConfig(**quick))
    assert steps == 3  # of the second epoch
    assert same_weights(whole, quick["out"])
    times = {"seconds", "cpu_seconds", "data_wait_seconds", "images_per_second"}
    logs = [(Path(run) / "log.jsonl").read_text().splitlines() for run in (whole, quick["out"])]
    ours, theirs = ([{k: v for k, v in json.loads(line).items() if k not in times} for line in log] for log in logs)
    assert ours == theirs


@pytest.mark.parametrize("name", ["state.pt", "weights.safetensors"])
def test_a_full_disk_is_said_in_a_line_and_the_old_files_stay(quick, done, name):
    """The kernel refuses in the middle of a write, as it does on a full disk."""
    run = Path(quick["out"])
    (run / "state.pt").write_bytes(b"old")
    stage = prepare(LabelerConfig(**quick), "labeler")
    folder = make_run_folder(stage, None)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(TargetError, match=rf"cannot write .*{name}: .*File too large.*nothing was changed there"):
            if name == "state.pt":
                folder.save_state({"model": stage.model.state_dict()})
            else:
                folder.save_weights(stage.model, stage.description)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_too_few_images_for_the_processes_are_found_before_the_old_run_is_deleted(quick, done, monkeypatch):
    before = {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()}
    stage = replace(prepare(LabelerConfig(**quick | {"resume": False}), "labeler"), world=World(0, 19))
    with pytest.raises(InputError, match="18 images cannot give each of 19 processes 1 batches of up to 128"):
        run_stage(stage, LabelerObjective(stage), stage.random_plan)
    assert {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()} == before


def test_other_settings_are_refused_by_name(quick, done):
    with pytest.raises(InputError, match="lr: 0.002 → 0.01"):
        train_labeler(LabelerConfig(**quick | {"lr": 0.01}))
    train_labeler(LabelerConfig(**quick | {"lr": 0.01, "resume": False}))


def test_the_precision_that_auto_came_to_is_part_of_a_run(quick, monkeypatch):
    """A machine that would choose another one must not go on unheard; said by name, it goes on anywhere."""
    monkeypatch.setattr(device, "_bf16_is_fast", lambda _: True)
    train_labeler(LabelerConfig(**quick | {"epochs": 1, "amp": "auto"}))
    monkeypatch.setattr(device, "_bf16_is_fast", lambda _: False)
    with pytest.raises(InputError, match="other settings .amp: 'bf16' → 'none'"):
        train_labeler(LabelerConfig(**quick | {"epochs": 1, "amp": "auto"}))
    assert train_labeler(LabelerConfig(**quick | {"epochs": 1, "amp": "bf16"}))["epochs"] == 1


def test_long_values_are_said_in_short():
    old = {"names": [f"n{number:08}" for number in range(1000)], "one": 1, "text": "a" * 500}
    new = {"names": old["names"][:-1], "one": 2, "text": "b" * 500}
    assert differences(old, new)[:2] == ["names: 1,000 → 999 of them", "one: 1 → 2"]
    assert len(differences(old, new)[2]) < 220
    swapped = {"names": [*old["names"][:7], "other", *old["names"][8:]]}
    assert differences({"names": old["names"]}, swapped) == ["names: 'n00000007' → 'other'"]


def test_processes_compare_what_they_have_to_do_together(quick, monkeypatch):
    said = []
    monkeypatch.setattr(run_folder, "agree", lambda values, _: said.append(values.tolist()) or True)
    for changes in ({}, {"log_every": 3}, {"val_every": 2}, {"flip": 0.0}):
        config = LabelerConfig(**quick | changes)
        folder = make_run_folder(prepare(config, "labeler"), None)
        run_folder.check_same_run(folder, config, torch.device("cpu"), World(0, 2))
    assert said[0] == said[1]
    assert said[0] != said[2]
    assert said[0] != said[3]


def test_a_folder_of_something_else_is_left_alone(quick):
    Path(quick["out"]).mkdir()
    (Path(quick["out"]) / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty"):
        train_labeler(LabelerConfig(**quick))
    assert [path.name for path in Path(quick["out"]).iterdir()] == ["thesis.tex"]
    assert (Path(quick["out"]) / "thesis.tex").read_text() == "years of work"


def test_a_new_start_that_fails_leaves_the_old_run_alone(quick, done, make_stripes, tmp_path):
    before = {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()}
    other = make_stripes(tmp_path / "other", 2, 3)
    (other / "vertical").rename(other / "checks")
    with pytest.raises(JoinError, match="checks"):
        train_labeler(LabelerConfig(**quick | {"val": str(other), "resume": False}))
    assert {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()} == before


def with_infinite_slope(loss):
    return loss + (loss * 0).sqrt()  # √0 adds nothing


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(lambda loss: loss * float("nan"), "the loss is nan"), (with_infinite_slope, "the gradient's norm is nan")],
    ids=["loss", "gradient"],
)
def test_what_is_not_finite_stops_the_run_before_the_weights(quick, monkeypatch, spoil, said):
    """In the third step: its samples are kept, and nothing of it is stored."""
    original = LabelerObjective.losses
    calls = 0

    def spoil_the_third_step(*arguments):
        nonlocal calls
        calls += 1
        losses = original(*arguments)
        return losses | {"loss": spoil(losses["loss"])} if calls == 3 else losses

    monkeypatch.setattr(LabelerObjective, "losses", spoil_the_third_step)
    with pytest.raises(TrainingError, match=said + r" at epoch 1, step 3; .*not-finite\.json"):
        train_labeler(LabelerConfig(**quick))
    evidence = json.loads((Path(quick["out"]) / "not-finite.json").read_text())
    beton = ensure_beton(quick["data"])
    third = shuffled(quick["seed"], 0, len(beton))[40:]
    assert evidence["sample_ids"] == third.tolist()
    assert evidence["keys"] == [beton.keys[sample] for sample in third]
    assert not (Path(quick["out"]) / "state.pt").exists()
    assert not (Path(quick["out"]) / "weights.safetensors").exists()


def test_a_gradient_that_no_loss_scale_makes_finite_stops_the_run(quick, monkeypatch):
    """fp16 leaves steps out and halves the scale, from 2¹⁶ to 1. An epoch has 9 steps."""
    original = LabelerObjective.losses

    def spoil(*arguments):
        losses = original(*arguments)
        return losses | {"loss": with_infinite_slope(losses["loss"])}

    monkeypatch.setattr(LabelerObjective, "losses", spoil)
    with pytest.raises(TrainingError, match=r"the gradient's norm is nan at epoch 2, step 17; "):
        train_labeler(LabelerConfig(**quick | {"epochs": 10, "batch_size": 5, "amp": "fp16"}))


def test_a_run_that_another_job_finished_meanwhile_is_not_begun_anew(quick, done, monkeypatch):
    config = LabelerConfig(**quick)
    before = {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "summary", lambda _: None)  # as it was when this job looked
        with pytest.raises(InputError, match="another job has just finished the run"):
            train_labeler(config)
    assert {path.name: path.read_bytes() for path in Path(quick["out"]).iterdir()} == before


def test_a_state_that_does_not_fit_in_memory_is_not_called_damaged(quick, done, monkeypatch):
    def load(*_, **__):
        raise MemoryError

    (Path(quick["out"]) / "summary.json").unlink()
    (Path(quick["out"]) / "state.pt").write_bytes(b"large")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        train_labeler(LabelerConfig(**quick))


def test_a_folder_that_another_job_trains_in_is_refused(quick):
    config = LabelerConfig(**quick)
    with (
        make_run_folder(prepare(config, "labeler"), None).held(),
        pytest.raises(InputError, match="another job is training in .*run; wait for it"),
    ):
        train_labeler(config)
    assert train_labeler(config)["epochs"] == 2


def test_a_start_that_was_killed_at_once_is_no_foreign_folder(quick):
    Path(quick["out"]).mkdir()
    (Path(quick["out"]) / ".config.json.1234.abcd.tmp").write_text("{")
    assert train_labeler(LabelerConfig(**quick | {"epochs": 1}))["epochs"] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b'{"settings": 3}'),
        ("config.json", b'{"settings": {}, "data": [], "stage": "labeler"}'),
        ("config.json", b"[" * 100_000),
        ("summary.json", b"{}"),
        ("summary.json", b'{"epochs": 2, "steps": 6, "train_seconds": 1.0, "loss": 1%s}' % (b"0" * 400)),
        ("summary.json", b'{"epochs": "2", "steps": 6, "train_seconds": 1.0, "loss": 0.5}'),
        ("summary.json", b'{"epochs": 2, "steps": 6, "train_seconds": [], "loss": 0.5}'),
        ("summary.json", b'{"epochs": 2'),
        ("state.pt", b"PK\3\4 and no more"),
        ("state.pt", pickle.dumps({"at": 1})),
        ("state.pt", None),
    ],
)
def test_a_damaged_run_says_so(quick, done, name, content):
    path = Path(quick["out"]) / name
    if name == "state.pt":
        (Path(quick["out"]) / "summary.json").unlink()
    if content is None:
        torch.save({"at": {}, "model": {}}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(FormatError, match=rf"{name} is damaged .*`resume=False`"):
        train_labeler(LabelerConfig(**quick))


def test_validation_of_other_classes_is_refused(quick, tmp_path, make_stripes):
    other = make_stripes(tmp_path / "other", 2, 5, classes=("diagonal", "vertical"))
    (other / "vertical").rename(other / "plaid")
    with pytest.raises(JoinError, match="plaid"):
        train_labeler(LabelerConfig(**quick | {"val": str(other)}))


def test_unknown_model_names_the_known_ones(quick):
    with pytest.raises(InputError, match="fan_tiny_8_p4_hybrid"):
        train_labeler(LabelerConfig(**quick | {"model": "resnet_50"}))


@pytest.fixture
def stopped(quick, once, monkeypatch):
    """The state of a run that was stopped at its end, before it was finished, and its settings."""
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda *_: None)
        folder, _ = once("stopped")
    shutil.copytree(folder, quick["out"])
    return Path(quick["out"]) / "state.pt", LabelerConfig(**quick)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_flipped_bit_of_a_state_is_refused(stopped, place):
    path, config = stopped
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"state.pt is damaged .*`resume=False`"):
        train_labeler(config)


def test_a_state_without_a_digest_is_resumed(stopped):
    """Releases before this one stored none."""
    path, config = stopped
    state = torch.load(path, weights_only=True)
    del state["sha256"]
    torch.save(state, path)
    assert train_labeler(config)["epochs"] == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"at": []},
        {"at": {"epoch": "1"}},
        {"at": {"epoch": -1}},
        {"at": {"place": 1}},
        {"history": 3},
        {"means": None},
        {"means": {"sums": {"loss": 1.0}, "images": 3}},
        {"model": {}},
        {"model": "weights"},
        {"average": None},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": [1]}},
    ],
    ids=str,
)
def test_a_state_of_something_else_is_refused_in_a_line(stopped, changes):
    path, config = stopped
    state = torch.load(path, weights_only=True) | changes
    del state["sha256"]
    torch.save(state, path)
    with pytest.raises(FormatError, match=r"state.pt is damaged, it holds no state of this run .*`resume=False`"):
        train_labeler(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"img_size": 12}, InputError, "12×12"),
        ({"img_size": 1 << 40}, InputError, "img_size"),
        ({"model": "fan_nano"}, InputError, "there is no model 'fan_nano'"),
        ({"auto_augment": "strong"}, InputError, "strong"),
        ({"out": "FILE/run"}, TargetError, "FILE is not a folder"),
        ({"out": "FILE"}, TargetError, "FILE is not a folder"),
        ({"out": "FULL"}, InputError, "FULL is not empty and holds no run"),
    ],
    ids=str,
)
def test_settings_are_checked_before_images_are_packed(quick, tmp_path, monkeypatch, changes, error, message):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    Path("FULL").mkdir()
    Path("FULL/notes.txt").write_text("mine")

    def pack(*_, **__):
        raise AssertionError("images were packed first")

    monkeypatch.setattr("stl_offline.training.setup.ensure_beton", pack)
    with pytest.raises(error, match=message):
        train_labeler(LabelerConfig(**quick | changes))


def test_a_folder_that_may_not_be_written_is_found_before_images_are_packed(quick, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for a user that is not root
    with pytest.raises(TargetError, match="no permission to write"):
        train_labeler(LabelerConfig(**quick))


@pytest.mark.parametrize("side", [8, 16])
def test_an_input_of_one_token_trains(quick, side):
    assert train_labeler(LabelerConfig(**quick | {"epochs": 1, "img_size": side}))["epochs"] == 1
