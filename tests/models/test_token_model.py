"""Any timm classifier as a token model: what it computes, trains and refuses."""

import copy

import pytest
import timm
import timm.optim
import torch

from stl_offline.errors import InputError
from stl_offline.models import (
    ModelDescription,
    TokenLabeler,
    TokenModel,
    build_model,
    check_model,
    create_labeler,
    load_model,
    resolve_model,
    save_classifier,
    save_model,
)
from tests.models.fan_fill import random_image

NAMES = ("ant", "bee", "cat")


def build(name, size=64, token_head="own", classes=3):
    torch.manual_seed(0)
    return build_model(name, classes, size, token_head=token_head).eval()


@pytest.mark.parametrize(
    ("name", "grid"), [("test_resnet", (3, 5)), ("test_convnext", (3, 5)), ("test_efficientnet", (3, 5))]
)
@torch.no_grad()
def test_class_logits_are_the_classifiers_and_tokens_have_the_maps_grid(name, grid):
    model = build(name)
    images = random_image(1, 96, 160)
    class_logits, token_logits = model(images)
    torch.testing.assert_close(class_logits, model.trunk(images))
    assert model.grid_size(96, 160) == grid
    assert token_logits.shape == (1, 15, 3)
    changed = images.clone()
    changed[..., 64:, :32] += 3.0  # the lower left cell
    difference = (model(changed)[1] - token_logits).abs().sum(-1)[0].unflatten(0, grid)
    assert difference[1:, :2].max() > difference[:, 3:].max()


@torch.no_grad()
def test_a_token_head_of_its_own_sees_each_patch_token():
    model = build("test_vit", 80)
    images = random_image(2, 80, 80)
    tokens = model.trunk.forward_features(images)[:, model.trunk.num_prefix_tokens :]
    norm, linear = model.token_head
    torch.testing.assert_close(model(images)[1], linear(norm(tokens)))
    assert linear.weight.std() == pytest.approx(0.02, rel=0.2)
    assert not linear.bias.any()
    assert model.pooling == "token head"


@torch.no_grad()
def test_a_shared_head_is_the_class_head_at_every_position():
    model = build("test_vit", 80, "shared")
    images = random_image(2, 80, 80)
    torch.testing.assert_close(model(images)[1], model.trunk.head(model.trunk.forward_features(images)[:, 1:]))
    assert set(model.state_dict()) == {f"trunk.{name}" for name in model.trunk.state_dict()}
    assert model.pooling == "class token"
    assert model.get_classifier() == (model.trunk.head,)


@pytest.mark.parametrize("token_head", ["own", "shared"])
def test_building_leaves_the_mode_and_the_statistics(token_head):
    torch.manual_seed(0)
    model = build_model("test_resnet", 3, 64, token_head=token_head)
    assert all(module.training for module in model.modules())
    model.check_view(64, 64)
    model.grid_size(96, 64)
    assert all(module.training for module in model.modules())
    assert {int(value) for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")} == {0}


def test_heads_are_float32_under_autocast_and_both_learn():
    model = build("test_vit", 32).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        class_logits, token_logits = model(random_image(2, 32, 32))
    assert class_logits.dtype == token_logits.dtype == torch.float32
    (class_logits.square().mean() + token_logits.square().mean()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_copy_is_independent():
    model = build("test_resnet")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    images = random_image(1, 64, 64)
    assert model(images)[1].abs().max() > 0
    assert twin(images)[1].abs().max() == 0
    assert twin.grid_size(96, 96) == (3, 3)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "levit_128s"])
def test_layers_learn_as_timm_scales_them_and_the_token_head_with_the_last(name):
    model = build(name, 224)
    options = {"weight_decay": 0.1, "layer_decay": 0.5}
    expected = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in timm.optim.param_groups_layer_decay(
            model.trunk, no_weight_decay_list=getattr(model.trunk, "no_weight_decay", set)(), **options
        )
        for parameter in group["params"]
    }
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, **options)
    found = {
        id(parameter): (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    heads = {id(parameter) for parameter in model.token_head.parameters()}
    assert {key: value for key, value in found.items() if key not in heads} == expected
    assert {found[key][0] for key in heads} == {1.0}
    assert len({scale for scale, _ in found.values()}) > 3


@pytest.mark.parametrize(
    ("name", "size", "token_head", "reason"),
    [
        ("crossvit_tiny_240", 240, "own", "crossvit_tiny_240 cannot have a token head: .*list, not one feature map"),
        ("test_vit3", 96, "shared", 'cannot share .*pools by attention, .*use `token_head="own"`'),
        ("mobilenetv3_small_050", 64, "shared", "mobilenetv3_small_050 cannot share .*not linear"),
        ("levit_128s", 224, "shared", "two heads"),
        ("repvit_m1", 64, "shared", "has a batch norm"),
        ("test_vit", 100, "own", "test_vit cannot take images of 100×100.*the nearest sizes that work: 96 and 112"),
        ("test_convnext", 100, "own", "test_convnext .*3×3 tokens.*the nearest sizes that work: 96 and 128"),
        ("fan_micro_4_p8", 64, "shared", "fan_micro_4_p8 has a token head of its own"),
        ("resnet5O", 64, "own", "no model 'resnet5O'.*resnet50"),
    ],
)
def test_refusals_name_the_reason(name, size, token_head, reason):
    with pytest.raises(InputError, match=reason):
        check_model(name, size, token_head, 0.0)


def test_options_that_a_family_does_not_have():
    with pytest.raises(InputError, match="vgg11 has no stochastic depth; set `drop_path` to 0, not 0.1"):
        build_model("vgg11", 3, 64, token_head="own", drop_path=0.1)
    model = build("test_resnet", 64)
    model.set_grad_checkpointing()
    assert model.trunk.grad_checkpointing
    with pytest.raises(InputError, match="convit_tiny has no gradient checkpointing"):
        build("convit_tiny", 224).set_grad_checkpointing()
    dropping = build_model("test_vit", 3, 32, token_head="own", drop_path=0.2)
    assert dropping.trunk.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


def test_attention_pooling_is_no_obstacle_to_a_token_head_of_its_own():
    check_model("test_vit3", 96, "own", 0.0)


def test_names():
    assert resolve_model("fan_micro_4_p8") == resolve_model("fan_micro_4_p8_token") == ("fan_micro_4_p8_token", "")
    tagged = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert resolve_model(tagged, "shared") == (tagged, "shared")


@pytest.fixture
def run(tmp_path):
    """A saved token model, and where it lies."""
    model = build("test_vit", 64)
    path = tmp_path / "weights.safetensors"
    save_model(path, model.state_dict(), ModelDescription("test_vit", NAMES, 64, "student", token_head="own"))
    return model, path


@torch.no_grad()
def test_a_file_gives_the_model_back_and_labels(run):
    model, path = run
    images = random_image(2, 64, 64)
    again, description = load_model(path)
    assert isinstance(again, TokenModel)
    assert (description.token_head, description.class_names) == ("own", NAMES)
    for found, expected in zip(again.eval()(images), model(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    labeler = create_labeler(path)
    assert (labeler.name, labeler.pooling, labeler.class_names) == ("test_vit", "token head", NAMES)
    for found, expected in zip(labeler(images), model(images), strict=True):
        torch.testing.assert_close(found, expected)
    assert create_labeler(path, img_size=96).grid_size(96, 96) == (6, 6)
    with pytest.raises(InputError, match="test_vit .*100×100.*the nearest sizes that work: 96 and 112"):
        create_labeler(path, img_size=100)


@torch.no_grad()
def test_the_classifier_alone_is_a_checkpoint_of_timm(run, tmp_path):
    model, path = run
    images = random_image(2, 64, 64)
    save_classifier(path, tmp_path / "classifier.safetensors")
    plain = timm.create_model(
        "test_vit", num_classes=3, img_size=64, checkpoint_path=str(tmp_path / "classifier.safetensors")
    )
    torch.testing.assert_close(plain.eval()(images), model(images)[0])


@torch.no_grad()
@pytest.mark.parametrize(("name", "token_head"), [("test_resnet", "own"), ("test_efficientnet", "shared")])
def test_a_convolutional_classifier_alone(name, token_head, tmp_path):
    model = build_model(name, 3, 64, token_head=token_head).eval()
    save_model(
        tmp_path / "w.safetensors",
        model.state_dict(),
        ModelDescription(name, NAMES, 64, "student", token_head=token_head),
    )
    assert save_classifier(tmp_path / "w.safetensors", tmp_path / "c.safetensors") == name
    plain = timm.create_model(name, num_classes=3, checkpoint_path=str(tmp_path / "c.safetensors"))
    images = random_image(2, 64, 96)
    torch.testing.assert_close(plain.eval()(images), model(images)[0])


@torch.no_grad()
def test_a_fans_classifier_alone(tmp_path):
    torch.manual_seed(0)
    model = build_model("fan_micro_4_p8_token", 3, 32, token_head="").eval()
    description = ModelDescription("fan_micro_4_p8_token", NAMES, 32, "student")
    save_model(tmp_path / "w.safetensors", model.state_dict(), description)
    save_classifier(tmp_path / "w.safetensors", tmp_path / "c.safetensors")
    path = str(tmp_path / "c.safetensors")
    plain = timm.create_model("fan_micro_4_p8", num_classes=3, img_size=32, checkpoint_path=path)
    images = random_image(2, 32, 32)
    torch.testing.assert_close(plain.eval()(images), model(images)[0])


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", ["test_vit", pytest.param("test_resnet", marks=pytest.mark.slow)])
def test_onnx(name, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(name, 64)
    images = random_image(2, 64, 64)
    with torch.no_grad():
        torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        outputs = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for output, expected in zip(outputs, model(images), strict=True):
            torch.testing.assert_close(torch.as_tensor(output), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("token_head", ["own", "shared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_the_heads_are_float32_whatever_the_trunk_is(token_head, dtype):
    """Built of such a trunk, or converted afterwards, as a labeler too."""
    torch.manual_seed(0)
    images = random_image(2, 64, 64)
    of_trunk = TokenModel(timm.create_model("test_vit", num_classes=3, img_size=64, dtype=dtype), token_head=token_head)
    later = TokenModel(timm.create_model("test_vit", num_classes=3, img_size=64), token_head=token_head).to(dtype)
    fan = TokenLabeler(timm.create_model("fan_micro_4_p8_token", num_classes=3), img_size=64).to(dtype)
    for model in (of_trunk, later, copy.deepcopy(later), TokenLabeler(later, img_size=64), fan):
        found = model.eval()(images.to(dtype))
        assert [each.dtype for each in found] == [torch.float32] * 2
        assert {each.dtype for each in model.parameters()} == {torch.float32, dtype}
    expected = later.float()(images)
    for each, wanted in zip(later.to(dtype)(images.to(dtype)), expected, strict=True):
        torch.testing.assert_close(each, wanted, rtol=0, atol=0.1)


@pytest.mark.parametrize("token_head", ["own", "shared"])
def test_images_of_other_channels(token_head):
    trunk = timm.create_model("test_resnet", num_classes=3, in_chans=2).train()
    model = TokenModel(trunk, img_size=64, token_head=token_head).train()
    model.check_view(64, 96)
    assert TokenLabeler(model, img_size=64)(torch.rand(1, 2, 64, 64))[1].shape == (1, 4, 3)
    broken = TokenModel(timm.create_model("test_resnet", num_classes=3), img_size=64).train()
    broken.trunk.in_chans = 1
    with pytest.raises(RuntimeError, match="channels"):
        broken.check_view(64, 64)
    assert all(module.training for module in broken.modules())


def test_a_labeler_takes_a_model_of_ones_own():
    model = build("test_resnet")
    labeler = TokenLabeler(model, img_size=96, class_names=NAMES)
    assert labeler.grid_size(96, 96) == (3, 3)
    assert labeler.positions is None
    assert not any(parameter.requires_grad for parameter in labeler.parameters())
