"""The inference form: equal to the model, also at the grid's borders, in batches of any size, and with other heads."""

import copy
import itertools

import pytest
import timm
import torch
from torch.profiler import ProfilerActivity, profile

from stl_offline.errors import InputError
from stl_offline.models import TokenLabeler, inference_form
from stl_offline.models import layers as layers_module
from stl_offline.models.folded_parts import border_bias, border_index
from tests.models.fan_fill import random_image
from tests.models.test_fan_numbers import randomise

STEMS = ["fan_micro_4_p8_token", "fan_tiny_12_p16_224_token", "fan_tiny_8_p4_hybrid_token"]


def build(name, **kwargs):
    return randomise(timm.create_model(name, **{"num_classes": 11, **kwargs}), seed=7)


@pytest.mark.parametrize("strips", [True, False])
@pytest.mark.parametrize("name", STEMS)
def test_equal_to_the_model(name, strips, monkeypatch):
    if not strips:
        monkeypatch.setattr("stl_offline.models.folded_parts.strips_pay", lambda x, compiled: False)
    monkeypatch.setattr(layers_module, "STRIP_VALUES", 512 * 7)  # strips that do not divide the rows
    model = build(name)
    form = inference_form(model)
    stride = model.patch_embed.stride
    with torch.inference_mode():
        for batch, rows, columns in ((1, 1, 1), (3, 1, 4), (2, 2, 1), (2, 3, 5)):
            images = random_image(batch, rows * stride, columns * stride)
            for output, expected in zip(form(images), model(images), strict=True):
                torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_strips_of_the_model_itself(rows, monkeypatch):
    model = build("fan_tiny_8_p4_hybrid_token")
    images = random_image(2, 32, 48)
    expected = model(images)
    monkeypatch.setattr(layers_module, "STRIP_VALUES", 512 * rows)
    before = images.clone()
    with torch.no_grad():
        maps = model.forward_intermediates(images, [0, 1], intermediates_only=True)
        kept = [one.clone() for one in maps]
        for output, wanted in zip(model(images), expected, strict=True):
            torch.testing.assert_close(output, wanted.detach(), rtol=0, atol=1e-5)
    assert torch.equal(images, before)
    assert all(torch.equal(one, other) for one, other in zip(maps, kept, strict=True))


def test_operator_in_strips_is_a_proper_one():
    generator = torch.Generator().manual_seed(0)
    target, x = torch.randn(2, 5, 8, generator=generator)
    weight1, bias1 = torch.randn(32, 8, generator=generator), torch.randn(32, generator=generator)
    weight2, bias2 = torch.randn(8, 32, generator=generator), torch.randn(8, generator=generator)
    torch.library.opcheck(layers_module.add_norm_gelu_mlp_, (target, x, 1e-6, weight1, bias1, weight2, bias2))


def test_the_model_stays_as_it_is():
    model = build("fan_micro_4_p8_token")
    before = copy.deepcopy(model.state_dict())
    form = inference_form(model)
    images = random_image(2, 24, 16)
    kept = images.clone()
    with torch.inference_mode():
        first = form(images)[1]
        second = form(images)[1]
    assert torch.equal(first, second)  # nothing that is changed in place belongs to the next call
    assert torch.equal(images, kept)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in form.parameters())


def test_passes_make_no_difference():
    model = build("fan_micro_4_p8_token")
    images = random_image(7, 16, 24)
    with torch.inference_mode():
        whole = inference_form(model, images_per_pass=7)(images)
        parts = inference_form(model, images_per_pass=3)(images)
        class_only = inference_form(model, images_per_pass=3, token_logits=False)(images)
    with_gradients = inference_form(model, images_per_pass=3)(images)
    for one, other, third in zip(whole, parts, with_gradients, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one, third)
    torch.testing.assert_close(class_only, whole[0])


def held_beside_outputs(model, images):
    """Bytes held at most during one call, less its outputs'."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outputs = model(images)
    changes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes)) - sum(output.nbytes for output in outputs)


@pytest.mark.parametrize("in_form", [False, True])
def test_memory_grows_with_classes_by_the_logits_alone(in_form):
    held = []
    for classes in (10, 2000):
        model = build("fan_micro_4_p8_token", num_classes=classes)
        form = inference_form(model, images_per_pass=4) if in_form else model
        held.append(held_beside_outputs(form, random_image(12, 32, 32)))
    logits = 12 * 17 * 2000 * 4
    assert held[1] - held[0] < logits / 50
    assert held[0] > 12 * 17 * 96 * 4  # the measurement sees the activations


def test_works_with_gradients_enabled_too():
    model = build("fan_tiny_8_p4_hybrid_token")
    images = random_image(2, 32, 16)
    torch.testing.assert_close(inference_form(model)(images)[1], model(images)[1].detach(), rtol=0, atol=1e-4)


def test_heads_only_as_needed():
    model = build("fan_micro_4_p8_token")
    images = random_image(2, 16, 16)
    class_only = inference_form(model, token_logits=False)
    torch.testing.assert_close(class_only(images), model(images)[0].detach(), rtol=0, atol=1e-4)
    assert len(class_only.heads) == 1
    plain = build("fan_micro_4_p8")
    torch.testing.assert_close(inference_form(plain)(images), plain(images).detach(), rtol=0, atol=1e-4)


def test_half_precision_keeps_float32_heads():
    model = build("fan_micro_4_p8_token")
    images = random_image(2, 32, 24)
    form = inference_form(model, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in form.blocks.parameters()} == {torch.bfloat16}
    scale = double_precision_head_scale(model)
    assert torch.equal(form.heads[0].weight, scale)
    for output, expected in zip(form(images), model(images), strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected.detach(), rtol=0, atol=0.1)


def double_precision_head_scale(model):
    return (model.head.weight.detach().double() * model.norm.weight.detach().double()).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_close_float32_logits(dtype):
    model = build("fan_tiny_8_p4_hybrid_token")
    form = inference_form(model)
    images = random_image(2, 32, 48)
    with torch.inference_mode():
        expected = model(images)
        with torch.autocast("cpu", dtype=dtype):
            outputs, plain_outputs = form(images), model(images)
    for output, plain, wanted in zip(outputs, plain_outputs, expected, strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, wanted, rtol=0, atol=0.1)
        torch.testing.assert_close(plain.float(), wanted, rtol=0, atol=0.1)


def test_what_has_no_inference_form():
    with pytest.raises(InputError, match="no token head"):
        inference_form(build("fan_micro_4_p8"), token_logits=True)
    with pytest.raises(InputError, match="'avg'"):
        inference_form(build("fan_micro_4_p8", global_pool="avg"))
    with pytest.raises(InputError, match="not this ResNet"):
        inference_form(timm.create_model("test_resnet"))
    with pytest.raises(InputError, match="20×16"):
        inference_form(build("fan_micro_4_p8"))(torch.zeros(1, 3, 20, 16))


def test_labeler_uses_it():
    labeler = TokenLabeler(build("fan_micro_4_p8_token"))
    assert type(labeler.model).__name__ == "InferenceFan"


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 5), (2, 1), (2, 2), (3, 4)])
def test_border_bias_is_a_padded_convolution_of_a_constant(rows, columns):
    shift, kernel = torch.randn(6).double(), torch.randn(6, 1, 3, 3).double()
    constant = shift[None, :, None, None].expand(1, 6, rows, columns)
    expected = torch.nn.functional.conv2d(constant, kernel, padding=1, groups=6)[0].permute(1, 2, 0)
    table = border_bias(shift, kernel)
    device = torch.device("cpu")
    torch.testing.assert_close(table[border_index(rows, device)][:, border_index(columns, device)], expected)
