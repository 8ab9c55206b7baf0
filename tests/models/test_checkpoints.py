"""Checkpoints: our own, the published pickles with all their habits, and files that must be refused."""

import argparse
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from stl_offline.errors import FormatError, InputError
from stl_offline.models import load_checkpoint
from tests.models.fan_fill import fill_model, random_image

NAME = "fan_micro_4_p8_token"


@pytest.fixture(scope="module")
def trained():
    return fill_model(timm.create_model(NAME, num_classes=7))


def fresh(name=NAME, classes=7):
    torch.manual_seed(1)
    return timm.create_model(name, num_classes=classes).eval()


def same_weights(model, other):
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


def old_names(state_dict):
    """As the first released files have it: other position name, joined class attention, DataParallel's prefix."""
    old = {}
    for name, value in state_dict.items():
        if ".attn.q." in name and name.startswith("cls_attn_blocks"):
            parts = [state_dict[name.replace(".attn.q.", f".attn.{letter}.")] for letter in "qkv"]
            old["module." + name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
        elif ".attn.k." in name or ".attn.v." in name:
            continue
        else:
            old["module." + name.replace("pos_embed.", "pos_embeder.")] = value
    return old


def test_safetensors(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    model = fresh()
    report = load_checkpoint(model, tmp_path / "model.safetensors")
    assert same_weights(model, trained)
    assert report.missing == report.unexpected == report.adapted == ()


def test_published_pickle_prefers_the_moving_average(tmp_path, trained):
    plain = {name: value + 1 for name, value in trained.state_dict().items()}
    content = {
        "epoch": 350,
        "arch": NAME,
        "state_dict": plain,
        "state_dict_ema": old_names(trained.state_dict()),
        "args": argparse.Namespace(lr=2e-3, data="/data"),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    model = fresh()
    assert load_checkpoint(model, tmp_path / "model_best.pth.tar").from_ema
    assert same_weights(model, trained)
    assert not load_checkpoint(model, tmp_path / "model_best.pth.tar", use_ema=False).from_ema
    torch.testing.assert_close(model.norm.weight, trained.norm.weight + 1)


def test_bare_state_dict_and_legacy_pickle(tmp_path, trained):
    torch.save(old_names(trained.state_dict()), tmp_path / "bare.pth", _use_new_zipfile_serialization=False)
    model = fresh()
    load_checkpoint(model, tmp_path / "bare.pth")
    assert same_weights(model, trained)


def test_timm_loads_old_names_too(tmp_path, trained):
    torch.save({"state_dict": old_names(trained.state_dict())}, tmp_path / "old.pth.tar")
    overlay = {"file": str(tmp_path / "old.pth.tar"), "num_classes": 7}
    model = timm.create_model(NAME, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay)
    assert same_weights(model, trained)
    other = timm.create_model(NAME, pretrained=True, num_classes=4, pretrained_cfg_overlay=overlay)
    assert other.aux_head.out_features == 4
    assert torch.equal(other.norm.weight, trained.norm.weight)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["STL_TEST_TRAP"],)


def test_a_pickle_never_runs_code(tmp_path, trained, monkeypatch):
    trap = tmp_path / "trap"
    monkeypatch.setenv("STL_TEST_TRAP", str(trap))
    torch.save({"state_dict": trained.state_dict(), "extra": Malicious()}, tmp_path / "bad.pth")
    with pytest.raises(FormatError, match="bad.pth was refused"):
        load_checkpoint(fresh(), tmp_path / "bad.pth")
    assert not trap.exists()


def test_files_that_are_no_checkpoints(tmp_path, trained):
    with pytest.raises(InputError, match="no checkpoint at"):
        load_checkpoint(fresh(), tmp_path / "absent.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("this is no checkpoint\n")
        with pytest.raises(FormatError, match=name):
            load_checkpoint(fresh(), tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FormatError, match="list, not a dict"):
        load_checkpoint(fresh(), tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "no_state.pth")
    with pytest.raises(FormatError, match="no state dict found"):
        load_checkpoint(fresh(), tmp_path / "no_state.pth")
    torch.save(trained.state_dict(), tmp_path / "cut.pth")
    whole = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=r"cut.pth"):
        load_checkpoint(fresh(), tmp_path / "cut.pth")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(FormatError, match="empty.safetensors holds no tensors"):
        load_checkpoint(fresh(), tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("name", "value", "kind", "words"),
    [
        ("head.weight", torch.tensor(1.0), InputError, r"head.weight is \(\) in the file"),
        ("cls_attn_blocks.0.attn.qkv.weight", torch.tensor(1.0), FormatError, r"has the shape \(\)"),
        ("norm.weight", torch.ones(128, dtype=torch.int8), FormatError, "norm.weight is of type torch.int8"),
        ("norm.weight", torch.ones(128, dtype=torch.int64), InputError, "norm.weight is of type torch.int64, not of"),
        ("norm.weight", torch.ones(128, dtype=torch.complex64), FormatError, "type torch.complex64"),
        ("norm.weight", torch.ones(128).to_sparse(), FormatError, "norm.weight is torch.sparse_coo on cpu"),
        ("norm.weight", torch.ones(128, device="meta"), FormatError, "norm.weight is torch.strided on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_tensors_that_are_no_weights(tmp_path, trained, name, value, kind, words):
    torch.save(trained.state_dict() | {name: value}, tmp_path / "odd.pth")
    model = fresh()
    with pytest.raises(kind, match=words) as raised:
        load_checkpoint(model, tmp_path / "odd.pth")
    assert "odd.pth" in str(raised.value) or name.startswith("cls_attn")
    assert same_weights(model, fresh())


def test_differences_are_reported_and_nothing_is_loaded(tmp_path, trained):
    state_dict = trained.state_dict()
    state_dict["stranger.weight"] = torch.zeros(2)
    del state_dict["norm.weight"]
    save_file(state_dict, tmp_path / "other.safetensors")
    model = fresh()
    before = model.head.weight.clone()
    with pytest.raises(InputError, match=r"missing 1 \(norm.weight\); unexpected 1 \(stranger.weight\)"):
        load_checkpoint(model, tmp_path / "other.safetensors")
    assert torch.equal(model.head.weight, before)
    report = load_checkpoint(model, tmp_path / "other.safetensors", strict=False)
    assert (report.missing, report.unexpected) == (("norm.weight",), ("stranger.weight",))
    assert torch.equal(model.head.weight, trained.head.weight)


def test_another_architecture_names_a_shape(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(InputError, match=r"does not fit fan_tiny_12_p16_224_token: \d+ shapes differ, e.g."):
        load_checkpoint(fresh("fan_tiny_12_p16_224_token"), tmp_path / "m.safetensors")


def test_other_class_count_only_when_asked(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "m.safetensors")
    model = fresh(classes=3)
    own_head = model.head.weight.clone()
    with pytest.raises(InputError, match=r"its head has 7 classes, the model's has 3; .*adapt_head=True"):
        load_checkpoint(model, tmp_path / "m.safetensors")
    report = load_checkpoint(model, tmp_path / "m.safetensors", adapt_head=True)
    assert set(report.adapted) == {"head.weight", "head.bias", "aux_head.weight", "aux_head.bias"}
    assert torch.equal(model.head.weight, own_head)
    assert torch.equal(model.norm.weight, trained.norm.weight)
    assert model(random_image(1, 16, 24))[1].shape == (1, 6, 3)


def test_token_head_present_on_one_side_only(tmp_path, trained):
    save_file(trained.state_dict(), tmp_path / "token.safetensors")
    plain = fresh("fan_micro_4_p8")
    with pytest.raises(InputError, match="has a token head, and fan_micro_4_p8 has none.*fan_micro_4_p8_token"):
        load_checkpoint(plain, tmp_path / "token.safetensors")
    load_checkpoint(plain, tmp_path / "token.safetensors", adapt_head=True)
    images = random_image(2, 16, 16)
    torch.testing.assert_close(plain(images), trained(images)[0])

    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    model = fresh()
    with pytest.raises(InputError, match="has no token head, and fan_micro_4_p8_token has one"):
        load_checkpoint(model, tmp_path / "plain.safetensors")
    assert load_checkpoint(model, tmp_path / "plain.safetensors", adapt_head=True).adapted == (
        "aux_head.weight",
        "aux_head.bias",
    )
    torch.testing.assert_close(model(images)[0], plain(images))


def test_by_order(tmp_path, trained):
    renamed = {f"layer{i}": value for i, value in enumerate(trained.state_dict().values()) if value.ndim}
    torch.save(renamed, tmp_path / "renamed.bin")
    model = fresh()
    with pytest.raises(InputError, match="missing .* unexpected"):
        load_checkpoint(model, tmp_path / "renamed.bin")
    load_checkpoint(model, tmp_path / "renamed.bin", by_order=True)
    assert same_weights(model, trained)
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(InputError, match="renamed.safetensors cannot be matched by order: .* give a .pth or .bin"):
        load_checkpoint(model, tmp_path / "renamed.safetensors", by_order=True)
    torch.save(dict(list(renamed.items())[:-1]), tmp_path / "short.bin")
    with pytest.raises(InputError, match="cannot be matched by order"):
        load_checkpoint(model, tmp_path / "short.bin", by_order=True)
    torch.save({name: value.flatten() for name, value in renamed.items()}, tmp_path / "flat.bin")
    with pytest.raises(InputError, match="tensor 0 has shape"):
        load_checkpoint(model, tmp_path / "flat.bin", by_order=True)
