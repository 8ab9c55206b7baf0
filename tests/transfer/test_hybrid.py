"""A hybrid FAN of a run as the backbone, in both kinds of transfer: strides 4, 8, 16 and 16, all of it trained."""

import timm
import torch

from stl_offline.config_transfer import DetectConfig, SegmentConfig, TransferEvaluateConfig
from stl_offline.models import ModelDescription, save_model
from stl_offline.transfer import evaluate_transfer, load_backbone, load_detector, load_segmenter
from stl_offline.transfer import train_detector as detect
from stl_offline.transfer import train_segmenter as segment
from tests.transfer.conftest import CLASSES, IGNORE, jpeg, scene, write_tar
from tests.transfer.test_detect import boxes_of, voc

NAME = "fan_tiny_8_p4_hybrid_token"
QUICK = {"epochs": 1, "batch_size": 2, "layer_decay": 0.7, "device": "cpu", "workers": 1, "amp": "none"}


def run_of(folder):
    """A student's run, with random weights."""
    torch.manual_seed(3)
    model = timm.create_model(NAME, num_classes=3, img_size=32)
    save_model(folder / "weights.safetensors", model.state_dict(), ModelDescription(NAME, tuple("abc"), 32, "student"))
    return str(folder)


def changed(trained, run) -> set[str]:
    """The parameters that fine-tuning has changed."""
    before = dict(load_backbone(run).named_parameters())
    assert before.keys() == dict(trained.named_parameters()).keys()
    return {name for name, value in trained.named_parameters() if not torch.equal(value, before[name])}


def test_a_segmenter_of_a_hybrid(tmp_path):
    run = run_of(tmp_path / "student")
    data = write_tar(tmp_path / "scenes.tar", {"train": range(3)}, (50, 70))
    sizes = {"crop_height": 32, "crop_width": 64, "head_width": 8, "ignore_id": IGNORE}
    config = SegmentConfig(
        **QUICK | sizes, data=str(data), classes=",".join(CLASSES), backbone=run, out=str(tmp_path / "run")
    )
    assert segment(config)["steps"] == 2
    model, description = load_segmenter(tmp_path / "run")
    assert (model.backbone.strides, model.backbone.channels) == ((4, 8, 16, 16), (128, 256, 192, 192))
    assert description.crop == (32, 64)
    check_all_of_it_learned(model.backbone, run)
    assert (
        evaluate_transfer(TransferEvaluateConfig(data=str(data), checkpoint=config.out, device="cpu"))["samples"] == 3
    )


def test_a_detector_of_a_hybrid(tmp_path):
    run = run_of(tmp_path / "student")
    for seed in range(3):
        image, ids = scene(seed, 64, 96)
        (tmp_path / f"{seed}.jpg").write_bytes(jpeg(image))
        (tmp_path / f"{seed}.xml").write_bytes(voc(boxes_of(ids)))
    sizes = {"side": 64, "longest": 96, "head_width": 8}
    config = DetectConfig(
        **QUICK | sizes, data=str(tmp_path), classes="box,disc", backbone=run, out=str(tmp_path / "run")
    )
    assert detect(config)["steps"] == 2
    model, _ = load_detector(tmp_path / "run")
    assert (model.backbone.backbone.strides, model.backbone.strides) == ((4, 8, 16, 16), [4, 8, 16, 32])
    check_all_of_it_learned(model.backbone.backbone, run)


def check_all_of_it_learned(backbone, run):
    moved = changed(backbone, run)
    assert {name for name, _ in backbone.named_parameters()} - moved <= unused(backbone)
    groups = backbone.parameter_groups(0.05, 0.7)
    scale = {id(value): group["lr_scale"] for group in groups for value in group["params"]}
    parameters = dict(backbone.named_parameters())
    first, last = (next(n for n in parameters if part in n) for part in ("patch_embed", "blocks.7"))
    assert scale[id(parameters[first])] < 0.7**7 < scale[id(parameters[last])] <= 1


def unused(backbone) -> set[str]:
    """What no map depends on."""
    backbone.zero_grad()
    sum(each.square().sum() for each in backbone(torch.randn(1, 3, 32, 64))).backward()
    return {name for name, value in backbone.named_parameters() if value.grad is None}
