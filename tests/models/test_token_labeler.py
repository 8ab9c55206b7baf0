"""Any classifier as a labeler: layouts, the mean identity, and heads that cannot be taken apart."""

import pytest
import timm
import torch

from stl_offline.errors import InputError
from stl_offline.models import TokenLabeler
from tests.models.fan_fill import fill_model, random_image


def build(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **kwargs).eval()


def test_fan_gives_its_own_token_logits():
    model = fill_model(build("fan_micro_4_p8_token"))
    labeler = TokenLabeler(model)
    images = random_image(2, 24, 40)
    class_logits, token_logits = labeler(images)
    expected_class, expected_token = model(images)
    torch.testing.assert_close(class_logits, expected_class.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(token_logits, expected_token.detach(), rtol=0, atol=1e-4)
    assert labeler.grid_size(24, 40) == (3, 5)
    assert labeler.name == "fan_micro_4_p8_token"
    assert labeler.num_classes == 5
    assert labeler.mean == (0.485, 0.456, 0.406)
    assert labeler.pooling == "token head"
    assert not any(parameter.requires_grad for parameter in labeler.parameters())


def test_heads_are_float32_under_autocast():
    model = fill_model(build("fan_micro_4_p8_token"))
    labeler = TokenLabeler(model)
    images = random_image(2, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = labeler(images)
    for output, expected in zip(outputs, model(images), strict=True):
        assert output.dtype == torch.float32
        torch.testing.assert_close(output, expected, rtol=0, atol=0.2)  # logits reach 3
        assert not torch.equal(output, output.bfloat16().float())


def test_evaluation_mode_survives_train():
    labeler = TokenLabeler(build("fan_micro_4_p8_token"))
    torch.nn.Sequential(labeler).train()
    assert not any(module.training for module in labeler.modules())


SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8)}
LINEAR = {
    "test_resnet": {},
    "test_efficientnet": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "mixer_s32_224": {},
    "test_vit": {"global_pool": "avg", "fc_norm": False},
    "resnetv2_50": {"layers": (1, 1, 1, 1)},
}


@pytest.mark.parametrize("name", sorted(LINEAR))
def test_mean_of_positions_is_the_class_logits(name):
    model = build(name, **LINEAR[name])
    labeler = TokenLabeler(model)
    size = model.pretrained_cfg["input_size"][-1]
    images = random_image(2, size, size)
    class_logits, token_logits = labeler(images)
    rows, columns = labeler.grid_size(size, size)
    assert token_logits.shape == (2, rows * columns, 5)
    assert (labeler.pooling, labeler.positions.linear) == ("mean", True)
    torch.testing.assert_close(class_logits, model(images))
    torch.testing.assert_close(token_logits.mean(dim=1), class_logits, rtol=1e-3, atol=1e-5)


def test_positions_follow_the_image_row_by_row():
    # Only the lower left corner of a wide image changes: so must the tokens there, most of all.
    labeler = TokenLabeler(build("test_resnet"))
    assert labeler.grid_size(96, 160) == (3, 5)
    images = random_image(1, 96, 160)
    changed = images.clone()
    changed[..., 80:, :16] += 3.0
    difference = (labeler(images)[1] - labeler(changed)[1]).abs().sum(-1).unflatten(1, (3, 5))[0]
    assert difference.argmax() == 2 * 5
    nhwc = TokenLabeler(
        build("swin_tiny_patch4_window7_224", img_size=(96, 160), window_size=(3, 5), **SWIN), img_size=(96, 160)
    )
    assert nhwc.grid_size(96, 160) == (3, 5)
    difference = (nhwc(images)[1] - nhwc(changed)[1]).abs().sum(-1).unflatten(1, (3, 5))[0]
    assert difference.argmax() == 2 * 5


@pytest.mark.parametrize(
    ("name", "pooling"),
    [
        ("test_vit", "class token"),
        ("vit_tiny_r_s16_p8_224", "class token"),
        ("fan_micro_4_p8", "class token"),
        ("test_convnext", "mean"),
        ("test_vit2", "mean"),
    ],
)
def test_head_after_a_norm_or_a_class_token(name, pooling):
    model = build(name)
    labeler = TokenLabeler(model)
    size = model.pretrained_cfg["input_size"][-1]
    images = random_image(2, size, size)
    class_logits, token_logits = labeler(images)
    torch.testing.assert_close(class_logits, model(images))
    assert labeler.pooling == pooling
    assert not labeler.positions.linear
    rows, columns = labeler.grid_size(size, size)
    assert token_logits.shape == (2, rows * columns, 5)


def test_patch_tokens_get_the_norm_and_head_of_the_class_token():
    model = build("test_vit")  # one class token
    features = model.forward_features(random_image(2, 160, 160))
    token_logits = TokenLabeler(model)(random_image(2, 160, 160))[1]
    torch.testing.assert_close(token_logits, model.head(features[:, 1:]))


def test_register_tokens_are_left_out():
    model = build("vit_tiny_patch16_224", reg_tokens=3, img_size=32)
    labeler = TokenLabeler(model, img_size=32)
    assert labeler.grid_size(32, 32) == (2, 2)
    images = random_image(1, 32, 32)
    torch.testing.assert_close(labeler(images)[1], model.head(model.forward_features(images)[:, 4:]))


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("test_vit3", {}, "attention"),
        ("resnet50_clip", {}, "attention"),
        ("deit_tiny_distilled_patch16_224", {}, "two heads"),
        ("mobilenetv3_small_050", {}, "not linear"),
        ("test_resnet", {"global_pool": "max"}, "'max'"),
        ("test_resnet", {"global_pool": "avgmax"}, "'avgmax'"),
        ("test_vit", {"global_pool": "max"}, "'max'"),
        ("crossvit_tiny_240", {}, "not one feature map"),
    ],
)
def test_refuses_heads_that_have_no_logits_per_position(name, kwargs, reason):
    with pytest.raises(InputError, match=f"{name} cannot label tokens: .*{reason}"):
        TokenLabeler(build(name, **kwargs))


def test_refuses_what_is_no_classifier():
    with pytest.raises(InputError, match="no classifier"):
        TokenLabeler(timm.create_model("test_resnet", num_classes=0))
    with pytest.raises(InputError, match="forward_features"):
        module = torch.nn.Conv2d(3, 5, 1)
        module.num_classes = 5
        TokenLabeler(module, name="mine")


def test_sizes_that_the_model_cannot_take():
    labeler = TokenLabeler(build("test_vit"))
    with pytest.raises(InputError, match="cannot take images of 100×160"):
        labeler.grid_size(100, 160)


def test_class_names_must_be_as_many_as_classes():
    assert TokenLabeler(build("test_resnet"), class_names="abcde").class_names == tuple("abcde")
    with pytest.raises(InputError, match="test_resnet has 5 classes, but 4 class names are given"):
        TokenLabeler(build("test_resnet"), class_names="abcd")
