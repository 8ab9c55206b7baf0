"""What timm's own test suite asks of a model, asked of every variant, plain and with a token head (torchscript apart).

Shapes are checked on the meta device, at each variant's real width and size; numbers on a small model of each stem.
"""

import copy
import functools

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import FeatureInfo, get_notrace_functions, get_notrace_modules, get_pretrained_cfg_value
from torchvision.models.feature_extraction import NodePathTracer, create_feature_extractor

from stl_offline.errors import InputError
from stl_offline.models import VARIANTS
from tests.models.fan_fill import fill_model, random_image

EVERY = sorted(name + suffix for name in VARIANTS for suffix in ("", "_token"))
SMALL = ["fan_micro_4_p8", "fan_micro_4_p8_token", "fan_tiny_8_p4_hybrid", "fan_tiny_8_p4_hybrid_token"]
# Every variant, those that repeat what a small one shows only among the slow tests.
SLOWLY_EVERY = [name if name in SMALL else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


@functools.cache
def _on_meta_once(name):
    with torch.device("meta"):
        return timm.create_model(name).eval()


def on_meta(name, **kwargs):
    """The model without memory or time for its numbers."""
    if not kwargs:
        return copy.deepcopy(_on_meta_once(name))
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def random_images(model, batch=2, height=None, width=None):
    channels, own_height, own_width = model.default_cfg["input_size"]
    return torch.empty(batch, channels, height or own_height, width or own_width, device="meta")


def small(name, **kwargs):
    return fill_model(timm.create_model(name, num_classes=6, **kwargs))


def class_part(outputs):
    return outputs[0] if isinstance(outputs, tuple) else outputs


@pytest.mark.parametrize("name", EVERY)
def test_shapes_of_outputs(name):
    model = on_meta(name)
    images = random_images(model, 3)
    stride = 8 if "micro" in name else 16
    tokens = (images.shape[2] // stride) * (images.shape[3] // stride)
    outputs = model(images)
    if name.endswith("_token"):
        assert isinstance(outputs, tuple)
        assert [output.shape for output in outputs] == [(3, 1000), (3, tokens, 1000)]
    else:
        assert outputs.shape == (3, 1000)


@pytest.mark.parametrize("name", EVERY)
def test_config_names_what_the_model_has(name):
    assert name in timm.list_models("fan_*", name_matches_cfg=True)
    assert name in timm.list_models("*_token" if name.endswith("_token") else "fan_*", module="variants")
    assert get_pretrained_cfg_value(name, "num_classes") == 1000
    model = on_meta(name)
    config, state_dict = model.default_cfg, model.state_dict()
    assert config["architecture"] == name
    assert config["input_size"] == (3, *model.img_size)
    assert not config["fixed_input_size"]
    assert resolve_data_config(model=model)["input_size"] == config["input_size"]
    assert model.get_parameter(config["first_conv"] + ".weight").shape[1] == model.in_chans == 3
    classifiers = config["classifier"]
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    assert [model.get_submodule(layer) for layer in classifiers] == list(heads)
    assert {layer + ".weight" for layer in classifiers} <= state_dict.keys()
    assert (model.num_classes, model.num_features) == (1000, model.head_hidden_size)


@pytest.mark.parametrize("name", SLOWLY_EVERY)
def test_heads_taken_off(name):
    model = on_meta(name)
    images = random_images(model)
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[2] == model.num_features
    assert pooled.shape == (2, model.head_hidden_size)

    def check(bare, class_shape):
        assert bare.num_classes == 0
        outputs = bare(images)
        assert class_part(outputs).shape == class_shape
        if name.endswith("_token"):  # without its head, a token's output is the token
            assert outputs[1].shape == (2, features.shape[1] - 1, model.num_features)

    model.reset_classifier(0)
    check(model, pooled.shape)
    model.reset_classifier(0, "")
    check(model, features.shape)
    assert model.forward_head(features, pre_logits=True).shape == features.shape
    check(on_meta(name, num_classes=0), pooled.shape)
    check(on_meta(name, num_classes=0, global_pool=""), features.shape)
    model.reset_classifier(9, "avg")
    assert class_part(model(images)).shape == (2, 9)


@pytest.mark.parametrize("name", SLOWLY_EVERY)
@pytest.mark.parametrize("out_indices", [None, 3, (-3, -2, -1), (1, -2)])
def test_features_only(name, out_indices):
    chosen = {} if out_indices is None else {"out_indices": out_indices}
    model = on_meta(name, features_only=True, feature_cls="getter", **chosen)
    info = on_meta(name).feature_info
    if out_indices is not None:
        wanted = range(len(info) - out_indices, len(info)) if isinstance(out_indices, int) else out_indices
        wanted = [info[i] for i in wanted]
        assert model.feature_info.channels() == [entry["num_chs"] for entry in wanted]
        assert model.feature_info.reduction() == [entry["reduction"] for entry in wanted]
        assert model.feature_info.module_name() == [entry["module"] for entry in wanted]
    else:
        assert len(model.feature_info.channels()) == 4
    outputs = model(torch.empty(2, 3, 96, 64, device="meta"))
    shapes = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [output.shape for output in outputs] == [(2, c, 96 // stride, 64 // stride) for c, stride in shapes]


@pytest.mark.parametrize("name", EVERY)
def test_feature_info_names_modules(name):
    model = on_meta(name)
    assert len(model.feature_info) == len(model.blocks) + (2 if "hybrid" in name else 0)
    for entry in model.feature_info:
        model.get_submodule(entry["module"])


@pytest.mark.parametrize("name", SLOWLY_EVERY)
def test_shapes_of_intermediates(name):
    model = on_meta(name)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    shapes = [(2, c, 64 // stride, 96 // stride) for c, stride in zip(info.channels(), info.reduction(), strict=True)]
    images = random_images(model, 2, 64, 96)
    for flag in (False, True):
        output, maps = model.forward_intermediates(images, norm=flag, stop_early=flag)
        assert output.shape == model.forward_features(images).shape
        assert [one.shape for one in maps] == shapes
    flat = model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)
    assert [one.shape for one in flat] == [(b, h * w, c) for b, c, h, w in shapes]


@pytest.mark.parametrize("name", SMALL)
def test_numbers_of_intermediates(name):
    model = small(name)
    images = random_image(2, 32, 48)
    output, maps = model.forward_intermediates(images)
    torch.testing.assert_close(output, model.forward_features(images))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(images)[0], output, rtol=1e-4, atol=1e-5)
    last = len(maps) - 1
    for stop_early in (False, True):
        some = model.forward_intermediates(images, [0, -2], stop_early=stop_early, intermediates_only=True)
        torch.testing.assert_close(some, [maps[0], maps[last - 1]])
    assert all(one.is_contiguous() for one in maps[-2:])
    normed = model.forward_intermediates(images, [-1], norm=True, output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(normed, model.norm(maps[-1].flatten(2).transpose(1, 2)))
    with pytest.raises(AssertionError):  # timm's own check of indices
        model.forward_intermediates(images, [last + 1])


@pytest.mark.parametrize("name", SMALL)
def test_pruned_to_what_the_maps_need(name):
    model = small(name)
    images = random_image(1, 32, 48)
    expected = model.forward_intermediates(images, [-3], intermediates_only=True)
    last = len(model.feature_info) - 1
    blocks = len(model.blocks)
    assert model.prune_intermediate_layers([-3]) == [last - 2]
    assert len(model.blocks) == blocks - 2
    torch.testing.assert_close(model.forward_intermediates(images, [last - 2], intermediates_only=True), expected)
    kept = small(name)
    assert kept.prune_intermediate_layers(1, prune_norm=True, prune_head=False) == [last]
    assert isinstance(kept.norm, torch.nn.Identity)
    assert class_part(kept(images)).shape == (1, 6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_symbolic_tracing(name, training):
    model = small(name).train(training)
    options = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    tracer = NodePathTracer(**options)
    output = next(reversed(tracer.trace(model).nodes))
    nodes = [tracer.node_to_qualname[node] for node in output.all_input_nodes]
    images = random_image(2, 32, 48)
    expected = model(images)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(nodes) == len(expected)
    traced = create_feature_extractor(
        model, train_return_nodes=nodes, eval_return_nodes=nodes, tracer_kwargs=options
    ).train(training)
    outputs = tuple(traced(images).values())
    for one, wanted in zip(outputs, expected, strict=True):
        assert torch.equal(one, wanted)
    sum(one.square().mean() for one in outputs).backward()
    assert [key for key, parameter in traced.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", SMALL)
def test_set_input_size(name):
    model = small(name)
    model.set_input_size((48, 80))
    assert model.img_size == (48, 80)
    assert resolve_data_config(model=model)["input_size"] == (3, 48, 80)
    with pytest.raises(InputError, match="50×80.*multiples"):
        model.set_input_size((50, 80))
    with pytest.raises(InputError, match="patch_size 5"):
        model.set_input_size(patch_size=5)
    assert model.img_size == (48, 80)
