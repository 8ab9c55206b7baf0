"""Backbones in other projects' code: timm's features_only, Hugging Face's TimmBackbone, segmentation_models_pytorch."""

from functools import partial

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from transformers import TimmBackbone, TimmBackboneConfig

from stl_offline import PyramidEncoder, load_backbone, save_classifier
from stl_offline.errors import InputError
from stl_offline.models import ModelDescription, save_model

HYBRID = "fan_tiny_8_p4_hybrid"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: a student with a token head, of random weights."""
    folder = tmp_path_factory.mktemp("run")
    model = timm.create_model(f"{HYBRID}_token", num_classes=3, img_size=64)
    description = ModelDescription(f"{HYBRID}_token", ("a", "b", "c"), 64, "student")
    save_model(folder / "weights.safetensors", model.state_dict(), description)
    return folder


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2))


@torch.inference_mode()
def test_timm_and_hugging_face_give_the_same_maps(run, images, tmp_path):
    backbone = load_backbone(run).eval()
    expected = backbone(images)
    name = save_classifier(run, tmp_path / "classifier.safetensors")
    file = {"file": str(tmp_path / "classifier.safetensors"), "num_classes": 3}
    features = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay=file)
    config = TimmBackboneConfig(backbone=HYBRID, out_indices=backbone.spec.indices, use_pretrained_backbone=False)
    theirs = TimmBackbone(config).eval()
    theirs._backbone.model.load_state_dict(backbone.net.model.state_dict())
    assert tuple(theirs.channels) == backbone.channels
    for found in (features.eval()(images), theirs(images).feature_maps):
        for ours, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, ours)


def test_segmentation_models_pytorch_takes_the_adapter(run, images):
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):  # what the adapter is for
        smp.create_model("Segformer", f"tu-{HYBRID}", encoder_weights=None)
    backbone = load_backbone(run)
    smp.encoders.encoders["stl"] = {
        "encoder": partial(PyramidEncoder, backbone),
        "params": {},
        "pretrained_settings": {},
    }
    for name in ("Segformer", "Unet", "FPN"):
        model = smp.create_model(name, "stl", encoder_weights=None, classes=5)
        logits = model(images)
        assert logits.shape == (2, 5, 64, 96)
    logits.sum().backward()
    assert backbone.net.model.blocks[7].gamma1.grad is not None
    with pytest.raises(InputError, match="3 channels here, got 1"):
        smp.create_model("Unet", "stl", encoder_weights=None, in_channels=1)
    with pytest.raises(InputError, match="five levels up to stride 32, got a depth of 4"):
        smp.create_model("Unet", "stl", encoder_weights=None, encoder_depth=4)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("fan_micro_4_p8", (8,) * 4),
        ("fan_tiny_12_p16_224", (16,) * 4),
        (HYBRID, (4, 8, 16, 16)),
        ("resnet10t", (4, 8, 16, 32)),
    ],
)
def test_every_backbone_becomes_a_pyramid(name, strides, images):
    with torch.device("meta"):
        encoder = PyramidEncoder(load_backbone(f"timm:{name}", (64, 96)))
        found = encoder(images.to("meta"))
    assert encoder.backbone.strides == strides
    assert [96 // each.shape[-1] for each in found] == [1, 2, 4, 8, 16, 32]
    assert [each.shape[1] for each in found] == encoder.out_channels


@torch.inference_mode()
def test_maps_that_have_their_stride_stay_as_they_are(run, images):
    backbone = load_backbone(run).eval()
    maps, found = backbone(images), PyramidEncoder(backbone)(images)
    for ours, other in zip(maps[:3], found[2:5], strict=True):
        assert torch.equal(ours, other)
    assert torch.equal(found[5], torch.nn.functional.max_pool2d(maps[3], 2))
