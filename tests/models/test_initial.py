"""Training starts from weights: of a run, of a file, of timm; heads of other classes start untrained."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from stl_offline.errors import InputError
from stl_offline.models import (
    ModelDescription,
    build_model,
    check_initial,
    freeze_trunk,
    load_initial,
    save_model,
)
from tests.models.fan_fill import random_image

NAMES = ("ant", "bee", "cat")


def build(name, size=64, classes=3, seed=0):
    torch.manual_seed(seed)
    return build_model(name, classes, size, token_head="" if name.startswith("fan") else "own")


def description(name, names=NAMES, size=64, **options):
    return ModelDescription(name, names, size, "student", token_head="" if name.startswith("fan") else "own", **options)


def equal(model, other):
    """Names of the tensors that two models share."""
    theirs = other.state_dict()
    return {name for name, value in model.state_dict().items() if torch.equal(value, theirs[name])}


@pytest.mark.parametrize(
    ("name", "heads"),
    [("test_resnet", ("trunk.fc", "token_head")), ("fan_micro_4_p8_token", ("head", "aux_head"))],
)
def test_a_run(name, heads, tmp_path):
    donor, path = build(name, seed=1), tmp_path / "weights.safetensors"
    save_model(path, donor.state_dict(), description(name))
    model = build(name)
    found = load_initial(model, str(tmp_path), description(name))
    assert equal(model, donor) == set(donor.state_dict())
    assert (found.new_heads, len(found.sha256)) == ((), 64)
    assert str(found) == f"initial weights from {tmp_path}"

    # The same count of other classes: a class's number means something else.
    model, before = build(name, seed=2), build(name, seed=2)
    others = description(name, ("cat", "bee", "ant"))
    found = load_initial(model, str(path), others)
    assert set(found.new_heads) == {"class head", "token head"}
    own = {key for key in donor.state_dict() if key.startswith(heads)}
    assert equal(model, donor) >= set(donor.state_dict()) - own
    assert equal(model, before) >= own

    # A student that was trained without token labels has no token head to give.
    save_model(path, donor.state_dict(), description(name, token_head_trained=False))
    assert load_initial(build(name), str(path), description(name)).new_heads == ("token head",)


def test_another_size_and_class_count(tmp_path):
    donor = build("test_vit", 64, classes=2, seed=1)
    save_model(tmp_path / "weights.safetensors", donor.state_dict(), description("test_vit", ("ant", "bee")))
    model = build("test_vit", 96)
    load_initial(model, str(tmp_path), description("test_vit", size=96))
    assert model.trunk.pos_embed.shape == (1, 6 * 6 + 1, 64)
    assert torch.equal(model.trunk.blocks[0].attn.qkv.weight, donor.trunk.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(("classes", "new"), [(3, ("token head",)), (7, ("class head", "token head")), (0, None)])
def test_a_file_of_timm(classes, new, tmp_path):
    torch.manual_seed(1)
    donor = timm.create_model("test_vit", num_classes=classes)  # for 160 pixels
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": donor.state_dict()}, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        model = build("test_vit")
        before = build("test_vit").state_dict()
        found = load_initial(model, str(tmp_path / name), description("test_vit"))
        assert found.new_heads == (new or ("class head", "token head"))
        assert torch.equal(model.trunk.blocks[1].mlp.fc1.weight, donor.blocks[1].mlp.fc1.weight)
        assert torch.equal(model.trunk.head.weight, donor.head.weight if classes == 3 else before["trunk.head.weight"])
        assert torch.equal(model.token_head[1].weight, before["token_head.1.weight"])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize(("classes", "new"), [(3, ()), (5, ("class head", "token head"))])
def test_a_token_model_that_a_loop_of_ones_own_saved(suffix, classes, new, tmp_path):
    """It has no description; its class names are unknown, their number is that of its heads."""
    donor, path = build("test_resnet", classes=classes, seed=1), tmp_path / f"w.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(donor.state_dict(), path)
    model, before = build("test_resnet"), build("test_resnet").state_dict()
    assert load_initial(model, str(path), description("test_resnet")).new_heads == new
    for name, value in model.state_dict().items():
        kept = new and name.startswith(("trunk.fc.", "token_head."))
        assert torch.equal(value, before[name] if kept else donor.state_dict()[name]), name


@pytest.mark.parametrize("wrong", ["token_head.1.weight", "token_head.extra"])
def test_a_foreign_file_with_a_token_head(wrong, tmp_path):
    donor = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file(donor | {wrong: torch.zeros(3, 7)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors does not fit test_resnet"):
        load_initial(build("test_resnet"), str(tmp_path / "w.safetensors"), description("test_resnet"))


def test_a_token_head_of_another_shape(tmp_path):
    weights = build("test_resnet").state_dict() | {"token_head.1.weight": torch.zeros(3, 7)}
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors does not fit test_resnet"):
        load_initial(build("test_resnet"), str(tmp_path / "w.safetensors"), description("test_resnet"))


def test_what_does_not_fit_is_refused_even_with_other_classes(tmp_path):
    save_file(timm.create_model("test_resnet", num_classes=9).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(InputError, match="w.safetensors does not fit test_vit"):
        load_initial(build("test_vit"), str(tmp_path / "w.safetensors"), description("test_vit"))
    donor = build("test_resnet")
    save_model(tmp_path / "r.safetensors", donor.state_dict(), description("test_resnet"))
    with pytest.raises(InputError, match="holds weights of a test_resnet, which do not fit a test_vit"):
        check_initial(str(tmp_path / "r.safetensors"), description("test_vit"))
    with pytest.raises(InputError, match="no run and no checkpoint at .*nowhere"):
        check_initial(str(tmp_path / "nowhere"), description("test_vit"))


def test_timms_own(monkeypatch):
    with pytest.raises(InputError, match="timm has no pretrained weights of fan_micro_4_p8_token"):
        check_initial("timm", description("fan_micro_4_p8_token"))
    original, model = timm.create_model, build("test_vit")

    def create(name, pretrained, **options):
        assert pretrained
        torch.manual_seed(1)
        return original(name, num_classes=5, **options)

    monkeypatch.setattr(timm, "create_model", create)
    found = load_initial(model, "timm", description("test_vit"))
    assert found.new_heads == ("class head", "token head")
    assert str(found).startswith("initial weights from timm (test_vit); untrained: the class head and the token head")
    torch.manual_seed(1)
    donor = original("test_vit", num_classes=5, img_size=64)
    assert torch.equal(model.trunk.blocks[0].attn.qkv.weight, donor.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_resnet", {"fc", "token_head"}),
        ("test_vit", {"head", "token_head"}),
        ("test_efficientnet", {"classifier", "token_head"}),
        ("fan_micro_4_p8_token", {"head", "aux_head"}),
    ],
)
def test_a_frozen_trunk_does_not_change(name, heads):
    model = build(name, 32)
    freeze_trunk(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.1)
    class_logits, token_logits = model(random_image(2, 32, 32))
    (class_logits.square().mean() + token_logits.square().mean()).backward()
    optimizer.step()
    after = model.state_dict()
    names = {key.removeprefix("trunk.").partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert names == heads


def test_statistics_that_cannot_be_fixed():
    with pytest.raises(InputError, match="`freeze` cannot fix the statistics of .* batch norms"):
        freeze_trunk(build("levit_128s", 224))
