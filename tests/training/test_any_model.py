"""Training of models that are no FANs: both stages, their labels, scores, reports, initial weights and resuming."""

import copy
import dataclasses
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, PreviewConfig, ReportConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.errors import InputError
from stl_offline.evaluation import evaluate
from stl_offline.labels.label_set import open_label_set
from stl_offline.models import build_model, load_model
from stl_offline.reports.find import find_images
from stl_offline.reports.preview import preview_labels
from stl_offline.reports.report import report_runs
from stl_offline.training.dry_run import dry_run
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student


def test_both_stages_labels_scores_and_a_report(quick, tmp_path):
    labeler, labels = tmp_path / "labeler", tmp_path / "labels"
    train_labeler(
        LabelerConfig(**quick | {"out": str(labeler), "model": "test_efficientnet", "img_size": 96, "epochs": 1})
    )
    dump = DumpConfig(data=quick["data"], labeler=str(labeler), out=str(labels), top_k=2, workers=1, device="cpu")
    dump_labels(dump)
    spec = open_label_set(labels).spec
    assert (spec.grid, spec.labeler["architecture"]) == ((3, 3), "test_efficientnet")

    config = StudentConfig(**quick | {"model": "test_vit", "labels": (str(labels),), "layer_decay": 0.8})
    summary = train_student(config)
    model, description = load_model(quick["out"])
    assert (description.model, description.token_head, description.token_head_trained) == ("test_vit", "own", True)
    scores = evaluate(EvaluateConfig(checkpoint=quick["out"], data=quick["val"], workers=1, device="cpu", amp="none"))
    assert scores["top1"] == summary["top1"] and scores["token_top1"] == summary["token_top1"]
    larger = EvaluateConfig(checkpoint=quick["out"], data=quick["val"], img_size=48, workers=1, device="cpu")
    assert evaluate(larger)["samples"] == 18
    page = tmp_path / "report.html"
    report_runs(
        ReportConfig(
            runs=(quick["out"],), data=quick["val"], labels=(str(labels),), out=str(page), examples=1, predict=8
        )
    )
    assert "test_vit" in page.read_text()
    preview = preview_labels(
        PreviewConfig(path=str(labels), data=quick["data"], out=str(tmp_path / "preview"), samples=2), find_images
    )
    assert preview.shown == 2 and "test_efficientnet" in preview.page.read_text()

    # Another run from these weights, with the trunk left alone; with other settings it is another run.
    frozen = dataclasses.replace(
        config, init=quick["out"], freeze=True, out=str(tmp_path / "frozen"), labels=("none",), layer_decay=1.0
    )
    assert dry_run(frozen, "student").outputs == "2×2 tokens"
    train_student(frozen)
    again = load_model(frozen.out)[0].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value) == (not name.startswith(("trunk.head", "token_head"))) or (
            name.startswith("token_head")  # no token labels: decayed at most
        )
    recorded = json.loads((tmp_path / "frozen" / "config.json").read_text())
    assert recorded["data"]["init"]["untrained"] == []
    with pytest.raises(InputError, match="init"):
        train_student(dataclasses.replace(frozen, init=frozen.out))


def test_a_shared_head_and_checkpointed_activations_resume(quick):
    config = StudentConfig(
        **quick | {"model": "test_resnet", "token_head": "shared", "grad_checkpointing": True, "checkpoint_steps": 1}
    )
    train_student(config)
    model, description = load_model(quick["out"])
    assert description.token_head == "shared"
    assert not any(name.startswith("token_head") for name in model.state_dict())
    assert train_student(config)["already_complete"]
    with pytest.raises(InputError, match="token_head"):
        train_student(dataclasses.replace(config, token_head="own"))


def test_checkpointed_activations_of_timms_models_count_their_batch_once():
    """timm's own recomputation would count it twice, and the averages of batch norms would differ."""
    torch.manual_seed(0)
    model = build_model("test_resnet", 3, 32, token_head="own")
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    recomputing.set_grad_checkpointing()
    images = torch.rand(4, 3, 32, 32)
    for each in (model, recomputing):
        for _ in range(2):
            class_logits, token_logits = each.train()(images)
            (class_logits.square().sum() + token_logits.square().sum()).backward()
    for (key, one), other in zip(model.named_buffers(), recomputing.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")
    for one, other in zip(model.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("batch_size", [1, 11, 44])
def test_a_step_of_one_image_is_refused_where_batch_norms_need_more(quick, batch_size):
    """45 images: the last step of an epoch has one. At 32 px the last map of this model is a single pixel."""
    config = StudentConfig(**quick | {"model": "test_resnet", "token_head": "shared", "batch_size": batch_size})
    for run in (train_student, partial(dry_run, stage_name="student")):
        with pytest.raises(InputError, match="of 45 images, with `batch_size`=.* batch norms of test_resnet cannot be"):
            run(config)
    assert not Path(config.out).exists()
    config = dataclasses.replace(config, batch_size=15)
    assert dry_run(config, "student").steps == 6


def test_models_are_checked_before_images_are_packed(quick):
    wrong = StudentConfig(**quick | {"data": "nowhere", "model": "crossvit_tiny_240", "img_size": 240})
    with pytest.raises(InputError, match="crossvit_tiny_240 cannot have a token head"):
        train_student(wrong)
    with pytest.raises(InputError, match="no run and no checkpoint at missing"):
        train_student(StudentConfig(**quick | {"data": "nowhere", "init": "missing"}))
