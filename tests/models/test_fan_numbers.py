"""FAN's numbers: against another implementation's outputs, and against formulas written out here in float64."""

import json
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.layers import FourierPositions, UnbiasedLayerNorm
from tests.models.fan_fill import fill_model, picture

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["fan_tiny_12_p16_224", "fan_tiny_8_p4_hybrid_token"])
def test_conformance(name):
    expected = json.loads((DATA / f"{name}.json").read_text())
    model = fill_model(timm.create_model(name, num_classes=7))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected["shapes"]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected["params"]
    with torch.inference_mode():
        outputs = model(picture(2, 64, 64))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(outputs) == (2 if "tokens" in expected else 1)
    for output, key in zip(outputs, ("cls", "tokens"), strict=False):
        torch.testing.assert_close(output, torch.tensor(expected[key]), rtol=0, atol=1e-4)


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
    images = picture(3, 40, 72)
    class_logits, token_logits = token(images)
    assert class_logits.shape == (3, 5)
    assert token_logits.shape == (3, 5 * 9, 5)
    torch.testing.assert_close(class_logits, plain(images))


@pytest.mark.parametrize(("name", "stride"), [("fan_micro_4_p8_token", 8), ("fan_tiny_8_p4_hybrid_token", 16)])
def test_any_size_that_the_stem_divides(name, stride):
    model = fill_model(timm.create_model(name, num_classes=3)).double()
    with torch.inference_mode():
        for rows, columns in ((1, 1), (1, 3), (2, 1), (3, 5)):
            images = picture(1, rows * stride, columns * stride).double()
            assert model.grid_size(rows * stride, columns * stride) == (rows, columns)
            class_logits, token_logits = model(images)
            assert token_logits.shape == (1, rows * columns, 3)
            assert class_logits.isfinite().all()
    for height, width in ((stride + 1, stride), (stride, 2 * stride - 1), (stride // 2, stride)):
        with pytest.raises(InputError, match=f"{height}×{width}.*multiples of {stride}"):
            model(torch.zeros(1, 3, height, width, dtype=torch.float64))


def test_rows_and_columns_are_not_swapped():
    # The second picture is the first one transposed: tokens of a wide and a tall grid differ, since y is not x.
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
