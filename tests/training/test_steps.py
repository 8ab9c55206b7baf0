"""What a step is: the same in parts, in half precision, with a limit on the gradient; and what is shown of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from stl_offline.config import EvaluateConfig, LabelerConfig, StudentConfig
from stl_offline.evaluation import evaluate
from stl_offline.models import load_model
from stl_offline.training import engine, label_sources, optimization
from stl_offline.training.optimization import make_optimizer, make_schedule
from stl_offline.training.run_folder import Progress
from stl_offline.training.steps import Share, StepInputs, token_scores
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import StudentObjective, train_student
from stl_offline.training.watch import RunWatch
from tests.test_losses import plain_ghost_loss
from tests.training.conftest import quick_settings


def log(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def without_batch_statistics(model):
    """Batch norms as they are in evaluation: their statistics depend on what is in a batch, by their very nature."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: module
            module.training = False


@pytest.fixture
def fixed_norms(monkeypatch):
    original = engine.Trainer.__init__

    def build(self, stage, *arguments):
        without_batch_statistics(stage.model)
        original(self, stage, *arguments)

    monkeypatch.setattr(engine.Trainer, "__init__", build)


def test_accumulated_batches_are_one_larger_batch(quick, tmp_path, fixed_norms):
    """Mixing, jitter, odd last batches and all; 45 images: steps of 20, 20 and 5, the last in parts of 2, 1, 1, 1."""
    config = quick | {"mixup": 0.8, "cutmix": 1.0}
    train_labeler(LabelerConfig(**config))
    parts = LabelerConfig(**config | {"batch_size": 5, "accumulate": 4, "out": str(tmp_path / "parts")})
    train_labeler(parts)
    for whole, found in zip(log(quick["out"]), log(parts.out), strict=True):
        for name in ("loss", "class_loss", "token_loss", "confidence"):
            assert found[name] == pytest.approx(whole[name], rel=5e-4), name


@pytest.mark.parametrize("schedule", ["cosine", "poly"])
def test_the_learning_rate_of_every_step(schedule):
    """Two steps of warm-up (a fifth of the run at most), then down to 1e-6 over the other ten."""
    config = SimpleNamespace(epochs=4, warmup_epochs=2.0, schedule=schedule)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, found = make_schedule(optimizer, config, 3), []
    for step in range(12):
        scheduler.step_update(step)
        found.append(optimizer.param_groups[0]["lr"])
    done = np.arange(10) / 10
    falling = (1 + np.cos(np.pi * done)) / 2 if schedule == "cosine" else 1 - done
    expected = [1e-6, (0.5 + 1e-6) / 2, *(1e-6 + (0.5 - 1e-6) * falling)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_shares_add_up_whatever_the_parts():
    """Class losses by images, token losses by labelled mass: the sum over parts is the mean over all."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(7, 4, 2, generator=generator)
    weights[5:] = 0  # a part without labels
    inputs = StepInputs(torch.zeros(7, 3, 8, 8), torch.zeros(7, 5), torch.zeros(7, 4, 2, dtype=torch.long), weights)
    values = torch.rand(7, generator=generator)
    by_images = by_mass = torch.zeros(())
    row = 0
    for part in inputs.parts(3):
        rows = values[row : row + len(part)]
        row += len(part)
        share = Share.of(part, inputs.totals(), 1)
        mass = part.token_weights.sum(dim=(1, 2))
        by_images = by_images + rows.mean() * share.images
        by_mass = by_mass + (rows * mass).sum() / mass.sum().clamp(min=1e-30) * share.mass
    assert row == 7
    torch.testing.assert_close(by_images, values.mean())
    mass = weights.sum(dim=(1, 2))
    torch.testing.assert_close(by_mass, (values * mass).sum() / mass.sum())
    assert [len(part) for part in StepInputs(torch.zeros(2, 3, 8, 8), torch.zeros(2, 5)).parts(4)] == [1, 1]


def test_token_scores_by_hand():
    logits = torch.log(torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]]))
    ids = torch.tensor([[[0, 1], [1, -1]]])
    weights = torch.tensor([[[0.6, 0.2], [0.5, 0.0]]])
    one = torch.ones(())
    scores = token_scores(logits, ids, weights, Share(one, one, one))
    assert float(scores["token_accuracy"]) == pytest.approx(0.6 / 1.3)
    assert float(scores["confidence"]) == pytest.approx(0.65)
    assert float(scores["labelled"]) == pytest.approx(0.65)


@pytest.mark.parametrize("residual", ["ghost", "uniform"])
def test_a_students_loss_by_hand(residual):
    """Class loss + weight × token loss, both smoothed, each by its share of the step."""
    generator = torch.Generator().manual_seed(3)
    logits, tokens = torch.randn(4, 5, generator=generator), torch.randn(4, 6, 5, generator=generator)
    classes = torch.rand(4, 5, generator=generator).softmax(dim=1)
    ids = torch.rand(4, 6, 5, generator=generator).argsort(dim=2)[..., :3]
    ids[..., 2] = -2 if residual == "ghost" else -1
    weights = torch.rand(4, 6, 3, generator=generator)
    config = SimpleNamespace(smoothing=0.2, token_weight=0.3, residual=residual, token_norm="mass")
    objective = StudentObjective(SimpleNamespace(config=config, device=torch.device("cpu"), amp=None), None)
    objective._targets_per_token = 3
    share = Share(torch.tensor(0.5), torch.tensor(0.25), torch.tensor(1.0))
    inputs = StepInputs(torch.zeros(4, 3, 2, 2), classes, ids, weights)
    found = objective.losses(lambda images: (logits, tokens), inputs, share)
    class_loss = 0.5 * nn.functional.cross_entropy(logits, classes)
    token_loss = 0.25 * plain_ghost_loss(tokens, ids, weights, 0.2, 3)
    assert float(found["class_loss"]) == pytest.approx(float(class_loss))
    assert float(found["token_loss"]) == pytest.approx(float(token_loss))
    assert float(found["loss"]) == pytest.approx(float(class_loss + 0.3 * token_loss))


@pytest.fixture(scope="module")
def loss_in_float32(stripes, tmp_path_factory):
    """Of the last of three epochs."""
    out = tmp_path_factory.mktemp("float32") / "run"
    train_labeler(LabelerConfig(**quick_settings(stripes, out) | {"epochs": 3}))
    return log(out)[-1]["loss"]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_learns_as_float32_does(quick, loss_in_float32, amp):
    half = LabelerConfig(**quick | {"epochs": 3, "amp": amp, "clip_grad": 1.0})
    summary = train_labeler(half)
    assert summary["loss"] == pytest.approx(loss_in_float32, rel=0.05)
    assert log(half.out)[-1]["gradient_norm"] > 0


@pytest.mark.parametrize("model", ["fan_micro_4_p8_token", "vit_tiny_patch16_224"])
@pytest.mark.parametrize(("amp", "fused"), [("none", True), ("bf16", False)])
def test_half_precision_on_a_cpu_trains_without_the_fused_attention(quick, monkeypatch, model, amp, fused):
    """Its gradient takes longer there than that of the operations that it stands for, which round otherwise: scores are
    measured with it, as `evaluate` measures them."""
    learned = []

    def attention(*tensors, **more):
        learned.append(torch.is_grad_enabled())
        return original(*tensors, **more)

    original = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    train_labeler(LabelerConfig(**quick | {"model": model, "amp": amp, "epochs": 1}))
    assert any(learned) is fused and False in learned


def test_no_step_is_longer_than_the_limit(quick, monkeypatch):
    """What reaches the optimiser, and what is said of it."""
    norms = []

    def make(model, config, lr, groups):
        optimizer = make_optimizer(model, config, lr, groups)
        original = optimizer.step

        def step(*arguments, **more):
            squares = [parameter.grad.square().sum() for parameter in model.parameters() if parameter.grad is not None]
            norms.append(float(torch.stack(squares).sum().sqrt()))
            return original(*arguments, **more)

        optimizer.step = step
        return optimizer

    monkeypatch.setattr(optimization, "make_optimizer", make)
    train_labeler(LabelerConfig(**quick | {"clip_grad": 0.05}))
    assert len(norms) == 6
    assert max(norms) <= 0.05 * 1.001
    assert max(norms) > 0.049
    assert log(quick["out"])[0]["gradient_norm"] > 0.05


def test_last_and_best_weights_are_timms(quick):
    summary = train_labeler(LabelerConfig(**quick | {"epochs": 4, "ema_decay": 0.9}))
    entries = log(quick["out"])
    assert all(0 <= entry["model_top1"] <= 1 for entry in entries)
    shown = [max(entry["top1"], entry["model_top1"]) for entry in entries]
    assert summary["best_top1"] == max(shown)
    assert [entry["best_top1"] for entry in entries] == [max(shown[: number + 1]) for number in range(4)]
    assert summary["top1_not_averaged"] == entries[-1]["model_top1"]
    for name, expected in (("weights", summary["top1"]), ("best", summary["best_top1"])):
        path = Path(quick["out"]) / f"{name}.safetensors"
        scores = evaluate(EvaluateConfig(data=quick["val"], checkpoint=str(path), device="cpu", workers=1))
        assert scores["top1"] == pytest.approx(expected)
        model = timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=32, checkpoint_path=path)
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        for ours, timms in zip(load_model(path)[0].eval()(images), model.eval()(images), strict=True):
            assert torch.equal(ours, timms)


def test_validation_every_few_epochs(quick):
    train_labeler(LabelerConfig(**quick | {"epochs": 5, "val_every": 2}))
    assert ["top1" in entry for entry in log(quick["out"])] == [False, True, False, True, True]


def test_tensorboard_shows_scalars_and_images(quick):
    """Read back with TensorBoard's own reader; a run that is repeated in part has every step once."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = StudentConfig(**quick | {"tensorboard": True, "log_every": 2})
    train_student(config)
    steps = [json.loads(line) for line in (Path(quick["out"]) / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps] == [2, 4, 6]
    assert {"loss", "class_loss", "lr", "images_per_second", "data_wait_seconds"} <= steps[0].keys()
    events = reader.EventAccumulator(str(Path(quick["out"]) / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("step/loss")] == [2, 4, 6]
    assert [event.value for event in events.Scalars("epoch/top1")] == pytest.approx(
        [entry["top1"] for entry in log(quick["out"])]
    )
    images = events.Images("predictions")
    assert [event.step for event in images] == [1, 2]
    assert (images[0].height, images[0].width) == (32, 32 * min(8, 5))


def test_lines_count_from_where_an_epoch_starts(tmp_path):
    """Neither the waiting before a kill nor what lies between two epochs is the next line's."""
    at = Progress(epoch=1, batch=7, step=20, waited=50.0)
    with RunWatch(tmp_path, LabelerConfig(data="x", out="y", log_every=3), at, enabled=True) as watch:
        watch.starts_epoch(at)
        for step in (21, 22, 23, 24):
            at.step, at.waited = step, at.waited + 1.0
            watch.step(at, 0.1, {"loss": 1.0}, 10)
        at = Progress(epoch=2, step=24)
        watch.starts_epoch(at)
        at.step, at.waited = 27, 0.25
        watch.step(at, 0.1, {"loss": float("nan")}, 10)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["data_wait_seconds"] for line in lines] == [1.0, 3.0, 0.25]
    assert [line["step"] for line in lines] == [21, 24, 27]
    assert lines[2]["loss"] is None


def test_heads_stay_in_float32_under_autocast():
    model = timm.create_model("fan_micro_4_p8_token", num_classes=5, img_size=32)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images)
    assert [logits.dtype for logits in found] == [torch.float32] * 2
    assert [logits.dtype for logits in model.bfloat16()(images.bfloat16())] == [torch.bfloat16] * 2


def test_a_model_that_is_compiled_learns_the_same(quick, tmp_path, monkeypatch):
    """All but code generation, which takes minutes of a processor: batches of 20 and a last one of 5."""
    compiled = []
    compile_model = torch.compile

    def compile_graphs(model, **how):
        compiled.append(compile_model(model, backend="aot_eager", **how))
        return compiled[-1]

    monkeypatch.setattr(optimization.torch, "compile", compile_graphs)
    config = LabelerConfig(**quick | {"epochs": 1})
    train_labeler(config)
    train_labeler(replace(config, compile=True, out=str(tmp_path / "compiled")))
    assert len(compiled) == 1
    ours, theirs = (
        safetensors.torch.load_file(Path(run) / "weights.safetensors") for run in (config.out, tmp_path / "compiled")
    )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_online_labels_of_a_step_of_many_batches_are_made_batch_by_batch(quick, tmp_path, monkeypatch, fixed_norms):
    """Those that the whole step would get at once, drawn ones too, in the memory of a batch."""
    train_labeler(LabelerConfig(**quick | {"epochs": 1, "out": str(tmp_path / "labeler")}))
    asked = []
    original = label_sources.online_targets

    def note(labeler, images, *more):
        asked.append(len(images))
        return original(labeler, images, *more)

    monkeypatch.setattr(label_sources, "online_targets", note)
    config = StudentConfig(**quick | {"epochs": 1, "labels": "online", "labeler": str(tmp_path / "labeler")})
    train_student(config)
    assert asked == [20, 20, 5]
    asked.clear()
    train_student(replace(config, batch_size=4, accumulate=5, out=str(tmp_path / "parts")))
    assert asked == [4] * 11 + [1]
    (whole,), (found,) = log(quick["out"]), log(tmp_path / "parts")
    for name in ("loss", "class_loss", "token_loss", "token_accuracy", "confidence"):
        assert found[name] == pytest.approx(whole[name], rel=5e-4), name
