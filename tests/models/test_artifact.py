"""The description in a weights file: from whoever made the file, so every value is checked before it is used."""

import dataclasses
import json

import pytest
import timm
from safetensors.torch import save_file

from stl_offline.errors import FormatError, InputError
from stl_offline.models import ModelDescription, create_labeler, load_model, read_description
from tests.models.fan_fill import fill_model

GOOD = ModelDescription("fan_micro_4_p8_token", ("ant", "bee", "cat"), 32, "labeler")


def write(path, header):
    model = fill_model(timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=32))
    save_file(model.state_dict(), path, metadata={"stl_offline": header})
    return path


def test_a_round_trip():
    assert ModelDescription.from_json(GOOD.to_json(), "here") == GOOD


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "hf-hub:someone/model"}, "model must be a name in timm's registry, got 'hf-hub:someone/model'"),
        ({"model": "local-dir:/etc"}, "model must be a name in timm's registry"),
        ({"model": "timm/resnet18"}, "model must be a name in timm's registry"),
        ({"model": "no_such_model"}, "model must be a name in timm's registry"),
        ({"model": ["resnet18"]}, "model must be a name in timm's registry"),
        ({"class_names": "abc"}, "class_names must be a list of 1 to 1,048,576 names, got 'abc'"),
        ({"class_names": []}, "class_names must be a list"),
        ({"class_names": [1, 2, 3]}, "class_names must be distinct strings"),
        ({"class_names": ["ant", "ant", "cat"]}, "class_names must be distinct strings"),
        ({"class_names": [["ant"], ["bee"]]}, "class_names must be distinct strings"),
        ({"img_size": "32"}, "img_size must be an integer from 1 to 8,192, got '32'"),
        ({"img_size": True}, "img_size must be an integer"),
        ({"img_size": 0}, "img_size must be an integer"),
        ({"img_size": 10**9}, "img_size must be an integer"),
        ({"img_size": float("nan")}, "img_size must be an integer"),
        ({"stage": "teacher"}, "stage must be one of labeler, student; got 'teacher'"),
        ({"stage": {}}, "stage must be one of"),
        ({"interpolation": "lanczos"}, "interpolation must be one of"),
        ({"token_head_trained": "no"}, "token_head_trained must be true or false, got 'no'"),
        ({"version": 2}, "version must be 1"),
        ({"version": True}, "version must be 1"),
        ({"version": None}, "it has no version"),
        ({"features_only": True}, r"unknown entries \['features_only'\]"),
    ],
)
def test_every_field_is_checked(tmp_path, monkeypatch, changes, reason):
    def never(*args, **kwargs):
        raise AssertionError("a model was built")

    path = write(tmp_path / "w.safetensors", json.dumps(dataclasses.asdict(GOOD) | changes))
    monkeypatch.setattr(timm, "create_model", never)
    for use in (read_description, load_model, create_labeler):
        with pytest.raises(FormatError, match=reason) as error:
            use(path)
        assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("header", ["", "null", "[]", "3", "{", "[" * 100_000, '{"version": 1}'])
def test_a_header_that_is_no_description(tmp_path, header):
    with pytest.raises(FormatError, match="has a model description that cannot be used"):
        read_description(write(tmp_path / "w.safetensors", header))


def test_what_timm_cannot_build(tmp_path):
    path = write(tmp_path / "w.safetensors", dataclasses.replace(GOOD, model="test_resnet").to_json())
    with pytest.raises(FormatError, match="describes a test_resnet of 3 classes for images of 32 pixels, which timm"):
        load_model(path)


def test_a_description_is_checked_where_it_is_made():
    with pytest.raises(InputError, match="img_size"):
        dataclasses.replace(GOOD, img_size=-1)
