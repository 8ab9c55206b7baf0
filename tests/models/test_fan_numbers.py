"""FAN's numbers: against another implementation's outputs, and against formulas written out here in float64."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models import VARIANTS
from stl_offline.models.layers import FourierPositions, UnbiasedLayerNorm, attention
from tests.benchmarks.fan_reference import reference
from tests.models.fan_fill import fill_model, random_image

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid_token"])
def test_conformance(name):
    expected = json.loads((DATA / f"{name}.json").read_text())
    model = fill_model(timm.create_model(name, num_classes=7))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    with torch.inference_mode():
        outputs = model(random_image(2, 64, 64))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == (2 if "tokens" in expected else 1)
    for output, key in zip(outputs, ("cls", "tokens"), strict=False):
        torch.testing.assert_close(output, torch.tensor(expected[key]), rtol=0, atol=1e-4)


def randomise(model, seed):
    """Weights like those of a trained model: every parameter matters, activations stay near one."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(1 + 0.3 * noise.tanh())
        elif value.ndim > 1 and "temperature" not in name:
            value.copy_(noise * (1.5 * value.shape[0] / value.numel()) ** 0.5)
        else:
            value.copy_(0.1 * noise + (0.0 if name.endswith(("bias", "running_mean")) else 0.8))
    return model.eval()


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_variant_agrees_with_its_formulas(name):
    with torch.device("meta"):  # no time for initial weights that are overwritten
        model = timm.create_model(name + "_token", num_classes=11)
        formulas = reference(name + "_token", num_classes=11).eval()
    model = randomise(model.to_empty(device="cpu"), seed=3)
    formulas.load_state_dict(model.state_dict(), assign=True)
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        for output, expected in zip(model(images), formulas(images), strict=True):
            assert expected.std() > 0.1
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-4)


def test_wide_maps_stay_in_autocasts_precision():
    """A wide map in float32 is written, and cast back for the next layer."""
    model = randomise(timm.create_model("fan_micro_4_p8", num_classes=3), seed=5)
    given = []
    for block in model.blocks:
        block.mlp.mlp_v.fc2.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(6))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    assert given == [torch.bfloat16] * len(model.blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 6])
@pytest.mark.parametrize("fused", [True, False])
def test_attention_agrees_with_torchs_in_float64(dtype, queries, fused):
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(2, 3, count, 8, generator=generator).to(dtype) for count in (queries, 7, 7)]
    weights = torch.randn(2, 3, queries, 8, generator=generator, dtype=torch.float64)

    def run(function, tensors):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        output = function(*tensors)
        return output, *torch.autograd.grad((output.double() * weights).sum(), tensors)

    exact = run(F.scaled_dot_product_attention, [tensor.double() for tensor in given])
    for got, expected in zip(run(partial(attention, fused=fused), given), exact, strict=True):
        assert got.dtype is dtype
        error = (got.double() - expected).norm() / expected.norm()
        assert error < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["fan_micro_4_p8_token", "fan_tiny_8_p4_hybrid_token"])
def test_gradients_agree_with_the_formulas(name):
    model = randomise(timm.create_model(name, num_classes=3), seed=5).double().train()
    formulas = reference(name, num_classes=3).double().train()
    formulas.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for each in (model, formulas):
        class_logits, token_logits = each(images)
        (class_logits.square().sum() + token_logits.square().sum()).backward()
    expected = dict(formulas.named_parameters())
    for key, parameter in model.named_parameters():
        wanted = expected[key].grad
        close = {"rtol": 1e-4, "atol": 1e-5 * wanted.abs().max().item() + 1e-8}  # angles are float32 in both
        torch.testing.assert_close(parameter.grad, wanted, **close, msg=lambda text, key=key: f"{key}: {text}")
    buffers = dict(formulas.named_buffers())
    for key, buffer in model.named_buffers():
        torch.testing.assert_close(
            buffer, buffers[key], rtol=1e-4, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("fan_tiny_8_p4_hybrid_token", 7.66),
        ("fan_small_12_p4_hybrid_token", 26.50),
        ("fan_base_16_p4_hybrid_token", 50.92),
        ("fan_large_16_p4_hybrid_token", 77.34),
        ("fan_tiny_12_p16_224", 7.32),
        ("fan_small_12_p16_224", 28.35),
    ],
)
def test_parameter_counts_of_the_papers(name, millions):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)


def test_token_variants_only_add_the_token_head():
    plain, token = (timm.create_model(name, num_classes=5) for name in ("fan_micro_4_p8", "fan_micro_4_p8_token"))
    assert set(token.state_dict()) - set(plain.state_dict()) == {"aux_head.weight", "aux_head.bias"}
    fill_model(plain), fill_model(token)
    images = random_image(3, 40, 72)
    class_logits, token_logits = token(images)
    assert class_logits.shape == (3, 5)
    assert token_logits.shape == (3, 5 * 9, 5)
    torch.testing.assert_close(class_logits, plain(images))


@pytest.mark.parametrize(("name", "stride"), [("fan_micro_4_p8_token", 8), ("fan_tiny_8_p4_hybrid_token", 16)])
def test_any_size_that_the_stem_divides(name, stride):
    model = fill_model(timm.create_model(name, num_classes=3)).double()
    with torch.inference_mode():
        for rows, columns in ((1, 1), (1, 3), (2, 1), (3, 5)):
            images = random_image(1, rows * stride, columns * stride).double()
            assert model.grid_size(rows * stride, columns * stride) == (rows, columns)
            class_logits, token_logits = model(images)
            assert token_logits.shape == (1, rows * columns, 3)
            assert class_logits.isfinite().all()
    for height, width in ((stride + 1, stride), (stride, 2 * stride - 1), (stride // 2, stride)):
        with pytest.raises(InputError, match=f"{height}×{width}.*multiples of {stride}"):
            model(torch.zeros(1, 3, height, width, dtype=torch.float64))


def test_rows_and_columns_are_not_swapped():
    # The second image is the first one transposed: tokens of a wide and a tall grid differ, since y is not x.
    model = fill_model(timm.create_model("fan_micro_4_p8_token", num_classes=3))
    positions = model.pos_embed(2, 4)
    assert positions.shape == (1, 8, 96)
    angle = 1 / (4 + 1e-6) * 2 * math.pi  # x of the first column, at frequency 1
    features = torch.zeros(64)
    y = 1 / (2 + 1e-6) * 2 * math.pi
    for i in range(32):
        divisor = 10000 ** (2 * (i // 2) / 32)
        wave = math.sin if i % 2 == 0 else math.cos
        features[i] = wave(y / divisor)
        features[32 + i] = wave(angle / divisor)
    projection = model.pos_embed.token_projection
    torch.testing.assert_close(positions[0, 0], projection.weight.flatten(1) @ features + projection.bias)


def test_position_projection_in_two_halves_is_the_whole_one():
    positions = FourierPositions(48).double()
    grid = positions(3, 5)
    assert grid.shape == (1, 15, 48)
    first_row, second_row = grid[0, :5], grid[0, 5:10]
    difference = second_row - first_row
    torch.testing.assert_close(difference, difference[:1].expand(5, -1))  # y's part does not depend on x


@pytest.mark.parametrize("channels", [2, 7, 128])
def test_unbiased_layer_norm(channels):
    norm = UnbiasedLayerNorm(channels, eps=1e-2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, channels)
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True, correction=1)
    expected = (x - mean) / torch.sqrt(variance + 1e-2) * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)
