"""What timm's own suite runs on a model, and what frameworks built on timm expect of one."""

import copy
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo, create_feature_extractor, get_graph_node_names
from timm.optim import param_groups_layer_decay, param_groups_weight_decay

from stl_offline.errors import InputError
from stl_offline.models import VARIANTS
from tests.models.fan_fill import fill_model, random_image

MICRO = ["fan_micro_4_p8", "fan_micro_4_p8_token"]
SMALL = [*MICRO, "fan_tiny_8_p4_hybrid", "fan_tiny_8_p4_hybrid_token"]


def first(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


def everything(outputs):
    """All logits in one tensor, whatever the number of outputs."""
    return torch.cat([output.flatten(0, -2) for output in outputs]) if isinstance(outputs, tuple) else outputs


def test_registry():
    names = timm.list_models("fan_*")
    assert set(names) == {name + suffix for name in VARIANTS for suffix in ("", "_token")}
    assert all(timm.is_model(name + "_token") for name in names if not name.endswith("_token"))


@pytest.mark.parametrize("name", SMALL)
def test_forward_and_gradient_checkpointing(name):
    model = timm.create_model(name).eval()
    images = random_image(1, 64, 64)
    outputs = everything(model(images))
    assert outputs.shape[-1] == 1000
    assert outputs.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(everything(model(images)), outputs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SMALL)
def test_backward_reaches_every_parameter(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=42, drop_path_rate=0.1).train()
    everything(model(random_image(2, 64, 64))).square().mean().backward()
    missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("name", ["fan_micro_4_p8_token", "fan_tiny_8_p4_hybrid_token"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = fill_model(timm.create_model(name, num_classes=4)).train()
    recomputing = copy.deepcopy(model)
    recomputing.set_grad_checkpointing()
    for each in (model, recomputing):
        everything(each(random_image(2, 32, 48))).square().sum().backward()
    for (key, one), other in zip(model.named_parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, key=key: f"{key}: {text}")
    # Recomputing the forward pass must not count its batch twice.
    for (key, one), other in zip(model.named_buffers(), recomputing.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", SMALL)
def test_default_config(name):
    model = timm.create_model(name).eval()
    state_dict, config = model.state_dict(), model.default_cfg
    assert config is model.pretrained_cfg
    assert config["architecture"] == name
    classifier = config["classifier"]
    for layer in (classifier,) if isinstance(classifier, str) else classifier:
        assert layer + ".weight" in state_dict
    assert config["first_conv"] + ".weight" in state_dict
    images = random_image(2, 64, 64)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[-1] == model.num_features
    assert pooled.shape == (2, model.head_hidden_size)
    torch.testing.assert_close(everything(model.forward_head(features)), everything(model(images)))
    model.reset_classifier(0)
    assert model.num_classes == 0
    assert first(model(images)).shape == pooled.shape
    torch.testing.assert_close(first(model(images)), pooled)
    headless = timm.create_model(name, num_classes=0).eval()
    assert first(headless(images)).shape == (2, model.num_features)
    model.reset_classifier(0, "")
    assert first(model(images)).shape == features.shape


def test_reset_classifier_resets_both_heads():
    model = timm.create_model("fan_micro_4_p8_token", num_classes=5)
    head, token_head = model.get_classifier()
    assert (head, token_head) == (model.head, model.aux_head)
    model.reset_classifier(11, "avg")
    class_logits, token_logits = model.eval()(random_image(1, 16, 24))
    assert class_logits.shape == (1, 11)
    assert token_logits.shape == (1, 6, 11)
    tokens = model.forward_features(random_image(1, 16, 24))[:, 1:]
    torch.testing.assert_close(class_logits, model.head(tokens.mean(dim=1)))
    with pytest.raises(InputError, match="'max' is not one of"):
        model.reset_classifier(3, "max")
    plain = timm.create_model("fan_micro_4_p8", num_classes=5)
    assert plain.get_classifier() is plain.head


def test_create_model_arguments():
    model = timm.create_model(
        "fan_micro_4_p8_token", num_classes=3, in_chans=5, img_size=(48, 80), drop_rate=0.4, drop_path_rate=0.2
    )
    assert model.default_cfg["input_size"] == (3, 48, 80)
    assert model.head_drop.p == 0.4
    assert {block.drop_path.drop_prob for block in model.blocks} == {0.2}
    assert model.eval()(torch.randn(2, 5, 48, 80))[1].shape == (2, 60, 3)
    hybrid = timm.create_model("fan_tiny_8_p4_hybrid", in_chans=1, num_classes=2).eval()
    assert hybrid(torch.randn(1, 1, 32, 16)).shape == (1, 2)
    with pytest.raises(InputError, match="20×16.*multiples of 8"):
        timm.create_model("fan_micro_4_p8", img_size=(20, 16))


def test_drop_rate_and_drop_path_act_in_training_only():
    model = fill_model(timm.create_model("fan_micro_4_p8", num_classes=3, drop_rate=0.5, drop_path_rate=0.5))
    images = random_image(4, 16, 16)
    torch.testing.assert_close(model(images), model(images))
    model.train()
    torch.manual_seed(0)
    assert not torch.allclose(model(images), model(images))


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    model = timm.create_model(name, features_only=True).eval()
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(channels) == 4
    height, width = 64, 96
    outputs = model(random_image(1, height, width))
    assert len(outputs) == len(channels)
    for output, channel, reduction in zip(outputs, channels, reductions, strict=True):
        assert output.shape == (1, channel, math.ceil(height / reduction), math.ceil(width / reduction))
        assert output.isfinite().all()
    if "hybrid" in name:
        assert reductions == [4, 8, 16, 16]
    # Nothing is kept that the maps do not need, so that distributed training finds no unused parameter.
    everything_used = sum(output.sum() for output in outputs)
    everything_used.backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_features_only_chosen_maps():
    model = timm.create_model("fan_tiny_8_p4_hybrid", features_only=True, out_indices=(1, 3)).eval()
    assert model.feature_info.reduction() == [8, 16]
    whole = timm.create_model("fan_tiny_8_p4_hybrid").eval()
    own = {key.removeprefix("model."): value for key, value in model.state_dict().items()}
    whole.load_state_dict(own, strict=False)
    maps = whole.forward_intermediates(random_image(1, 32, 64), indices=[1, 3], intermediates_only=True)
    for ours, expected in zip(model(random_image(1, 32, 64)), maps, strict=True):
        torch.testing.assert_close(ours, expected)
    assert len(model.model.blocks) == 2


@pytest.mark.parametrize("name", SMALL)
def test_intermediates(name):
    model = timm.create_model(name).eval()
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    images = random_image(1, 64, 96)
    output, maps = model.forward_intermediates(images)
    assert len(maps) == len(info.channels())
    for one, channels, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
        assert one.shape == (1, channels, 64 // reduction, 96 // reduction)
    torch.testing.assert_close(output, model.forward_features(images))
    lists = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    for one, flat in zip(maps, lists, strict=True):
        assert torch.equal(one.flatten(2).transpose(1, 2), flat)
    last = model.forward_intermediates(images, indices=1, stop_early=True, norm=True, intermediates_only=True)
    assert torch.equal(last[0], model.norm(lists[-1]).transpose(1, 2).unflatten(2, maps[-1].shape[2:]))
    with pytest.raises(InputError, match="'NHWC' is not one of"):
        model.forward_intermediates(images, output_fmt="NHWC")


@pytest.mark.parametrize("name", SMALL)
def test_fx_tracing(name):
    model = fill_model(timm.create_model(name, num_classes=6))
    node = get_graph_node_names(model)[1][-1]
    traced = create_feature_extractor(model, return_nodes=[node])
    images = random_image(1, 32, 48)
    outputs = model(images)
    expected = outputs[-1] if isinstance(outputs, tuple) else outputs
    assert torch.equal(next(iter(traced(images).values())), expected)


def test_weight_decay_skips_what_the_paper_skips():
    model = timm.create_model("fan_micro_4_p8_token")
    skipped = model.no_weight_decay()
    assert {"cls_token", "pos_embed", "pos_embed.token_projection.weight", "blocks.0.mlp.temperature"} <= skipped
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=skipped)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert not any(key.startswith(("pos_embed", "cls_token")) or key.endswith("temperature") for key in decayed)
    assert all(model.get_parameter(key).ndim > 1 for key in decayed)
    assert "blocks.0.mlp.mlp_v.fc1.weight" in decayed


@pytest.mark.parametrize("name", ["fan_micro_4_p8_token", "fan_tiny_8_p4_hybrid_token"])
def test_layer_decay_grows_from_stem_to_head(name):
    model = timm.create_model(name)
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    scale = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    assert set(scale) == {key for key, _ in model.named_parameters()}
    order = [
        model.default_cfg["first_conv"] + ".weight",
        "blocks.0.attn.q.weight",
        "blocks.1.attn.q.weight",
        f"blocks.{len(model.blocks) - 1}.mlp.q.weight",
        "cls_attn_blocks.0.attn.q.weight",
        "cls_attn_blocks.1.attn.q.weight",
        "head.weight",
    ]
    scales = [scale[key] for key in order]
    assert scales == sorted(scales)
    assert len(set(scales)) == len(order)
    assert scale["head.weight"] == scale["aux_head.weight"] == 1.0
    assert scale["cls_token"] == scale["pos_embed.token_projection.weight"]
    coarse = model.group_matcher(coarse=True)
    assert set(coarse) == {"stem", "blocks", "cls_attn_blocks"}
