"""Weights files are compared with the digest in their header before anything is made of them."""

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from stl_offline.errors import FormatError
from stl_offline.models import ModelDescription, load_model, save_model


@pytest.fixture
def saved(tmp_path):
    """A file as `save_model` writes it, and its model."""
    torch.manual_seed(3)
    model = timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=16)
    path = tmp_path / "weights.safetensors"
    save_model(path, model.state_dict(), ModelDescription("fan_micro_4_p8_token", ("a", "b", "c"), 16, "student"))
    return path, model


def test_equal_models_are_equal_files(saved):
    """safetensors gives metadata a random order; a label set's manifest names its labeler by the file's SHA-256."""
    path, model = saved
    first = path.read_bytes()
    description = ModelDescription("fan_micro_4_p8_token", ("a", "b", "c"), 16, "student")
    for _ in range(8):
        save_model(path, model.state_dict(), description)
        assert path.read_bytes() == first


def test_names_that_json_escapes(tmp_path):
    """Of class names that two writers of JSON may write differently, the file stays whole."""
    names = ("\u00fcber \U0001f600", 'quote " and \\', "tab\tand\x7f\x01", "\u2028")
    model = timm.create_model("fan_micro_4_p8_token", num_classes=4, img_size=16)
    save_model(
        tmp_path / "w.safetensors", model.state_dict(), ModelDescription("fan_micro_4_p8_token", names, 16, "student")
    )
    assert load_model(tmp_path / "w.safetensors")[1].class_names == names


def test_what_was_saved_is_loaded(saved):
    path, model = saved
    found, description = load_model(path)
    assert description.token_head_trained
    assert all(torch.equal(value, found.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_of_a_weight_is_refused(saved, place):
    path, _ = saved
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + int(place * (len(data) - start))] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="is damaged: its content has SHA-256"):
        load_model(path)


def test_a_changed_description_is_refused(saved):
    path, _ = saved
    data = path.read_bytes()
    changed = data.replace(b'\\"a\\", \\"b\\"', b'\\"a\\", \\"d\\"')
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(FormatError, match="is damaged: its content has SHA-256"):
        load_model(path)


def test_a_file_without_a_digest_is_loaded(saved):
    """Releases before this one wrote none."""
    path, model = saved
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = {"stl_offline": file.metadata()["stl_offline"]}
    safetensors.torch.save_file(model.state_dict(), path, metadata=metadata)
    assert load_model(path)[1].class_names == ("a", "b", "c")
