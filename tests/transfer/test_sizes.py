"""Backbones at other sizes than those that they were trained for, and those that have one size only."""

import copy
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed

from stl_offline.config_transfer import DetectConfig, SegmentConfig, TransferEvaluateConfig
from stl_offline.errors import InputError
from stl_offline.transfer import evaluate_transfer
from stl_offline.transfer.backbone import Backbone, BackboneSpec, load_backbone, unfit_size
from stl_offline.transfer.detect import train_detector
from stl_offline.transfer.detector import Detector
from stl_offline.transfer.segment import train_segmenter
from tests.transfer.conftest import CLASSES, IGNORE, write_folders


def test_positions_are_resampled_to_the_crop(tmp_path):
    """As timm resamples them; without, a plain transformer would fit crops of its training's size alone."""
    model = timm.create_model("test_vit", num_classes=3)
    safetensors.torch.save_file(model.state_dict(), tmp_path / "vit.safetensors")
    backbone = load_backbone("timm:test_vit", (96, 128), checkpoint=tmp_path / "vit.safetensors")
    own = dict(backbone.net.model.named_parameters())
    expected = resample_abs_pos_embed(model.pos_embed, new_size=[6, 8], num_prefix_tokens=model.num_prefix_tokens)
    torch.testing.assert_close(own["pos_embed"], expected)
    assert torch.equal(own["blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight)
    assert [tuple(each.shape[-2:]) for each in backbone(torch.zeros(1, 3, 96, 128))] == [(6, 8)] * len(backbone.strides)


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        ("test_vit", True),
        ("resnet10t", True),
        ("fan_micro_4_p8", True),
        ("swin_tiny_patch4_window7_224", True),
        ("test_vit_relpos", False),
        ("test_maxvit", False),
    ],
)
def test_backbones_of_one_size_are_known_without_computing(name, fits):
    backbone = Backbone(BackboneSpec(name, (0, 1), (64, 96))).eval()
    size = (3 * backbone.multiple, 5 * backbone.multiple)
    assert unfit_size(backbone, [(64, 96)]) is None
    assert unfit_size(backbone, [(64, 96), size]) == (None if fits else size)
    if fits:
        assert backbone(torch.zeros(1, 3, *size))[1].shape[-1] == size[1] // backbone.strides[1]
    else:
        with pytest.raises((AssertionError, RuntimeError)):
            backbone(torch.zeros(1, 3, *size))


@pytest.fixture
def fixed(tmp_path):
    """Settings of a segmenter whose backbone takes the crop's size only."""
    write_folders(tmp_path / "data", range(2))
    return {
        "data": str(tmp_path / "data"),
        "val": str(tmp_path / "data"),
        "classes": ",".join(CLASSES),
        "ignore_id": IGNORE,
        "backbone": "timm:test_vit_relpos",
        "out": str(tmp_path / "run"),
        "crop_height": 32,
        "crop_width": 32,
        "head_width": 8,
        "epochs": 1,
        "batch_size": 2,
        "device": "cpu",
        "workers": 1,
        "amp": "none",
    }


def test_whole_images_are_refused_before_training(fixed):
    with pytest.raises(InputError, match="test_vit_relpos cannot take the whole image .* with `sliding_window`"):
        train_segmenter(SegmentConfig(**fixed))
    assert not Path(fixed["out"]).exists()
    train_segmenter(SegmentConfig(**fixed | {"sliding_window": True}))
    config = {"data": fixed["data"], "checkpoint": fixed["out"], "device": "cpu", "workers": 1}
    with pytest.raises(InputError, match="with `sliding_window`"):
        evaluate_transfer(TransferEvaluateConfig(**config))
    assert evaluate_transfer(TransferEvaluateConfig(**config, sliding_window=True))["samples"] == 2
    boxes = {name: value for name, value in fixed.items() if name not in ("ignore_id", "crop_height", "crop_width")}
    boxes["out"] += "-boxes"
    with pytest.raises(InputError, match="its input size is fixed, and images of a detector are of many sizes"):
        train_detector(DetectConfig(**boxes | {"side": 64, "longest": 96}))


@torch.inference_mode()
def test_a_flat_image_changes_nothing_for_the_next():
    """torchvision would take the maps' scales from it, and keep them."""
    torch.manual_seed(0)
    backbone = Backbone(BackboneSpec("resnet10t", (1, 2, 3, 4), (64, 64)))
    detector = Detector(backbone, 3, (96,), 160, 16, masks=True).eval()
    image = torch.rand(3, 120, 150)
    expected = copy.deepcopy(detector)([image])[0]
    detector([torch.rand(3, 50, 200)])
    found = detector([image])[0]
    assert len(found["boxes"]) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert detector.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_maps_of_stride_14_are_pooled_at_it():
    backbone = Backbone(BackboneSpec("eva02_tiny_patch14_224", (2, 5, 8, 11), (56, 56)))
    detector = Detector(backbone, 2, (56,), 56, 8)
    assert detector.roi_heads.box_roi_pool.scales == [1 / 14, 1 / 28, 1 / 56, 1 / 112]
