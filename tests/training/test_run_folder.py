"""A run's folder: when it is complete, whose it is, and of which images."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from stl_offline.config import LabelerConfig
from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.images.pack import pack
from stl_offline.models import read_description
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.train_labeler import train_labeler
from tests.training.conftest import SIZE


def test_images_shrunk_otherwise_are_other_images(quick, stripes, tmp_path):
    """A .beton's fingerprint is that of its source: packed again with other sizes, it stays the same."""
    data = tmp_path / "train.beton"
    pack(stripes[0], data)
    config = LabelerConfig(**quick | {"data": str(data), "epochs": 1})
    train_labeler(config)
    assert train_labeler(config)["already_complete"]
    data.unlink()
    pack(stripes[0], data, max_size=SIZE // 2)
    with pytest.raises(InputError, match=rf"other settings \(train.max_size: .*{SIZE // 2}"):
        train_labeler(config)


def test_a_run_whose_folder_is_moved_ends_with_an_error(quick, tmp_path, monkeypatch):
    """It is not made anew, where its files would belong to no run."""
    save = RunFolder.save_weights

    def move_and_save(self, *given, **settings):
        os.rename(quick["out"], tmp_path / "moved")
        save(self, *given, **settings)

    monkeypatch.setattr(RunFolder, "save_weights", move_and_save)
    with pytest.raises(TargetError, match="was moved or removed during the run; put it back, or give its new place"):
        train_labeler(LabelerConfig(**quick))
    assert not Path(quick["out"]).exists()
    monkeypatch.undo()
    assert train_labeler(LabelerConfig(**quick | {"out": str(tmp_path / "moved")}))["top1"] is not None


def test_another_kind_of_run_is_named(quick, tmp_path):
    """A segmenter's weights are whole; they are no classifier's."""
    place = tmp_path / "weights.safetensors"
    header = {"stl_offline": '{"kind": "segmenter", "version": 1, "classes": ["a"]}'}
    safetensors.torch.save_file({"x": torch.zeros(1)}, place, metadata=header)
    with pytest.raises(FormatError, match=r"is a segmenter, not a classifier; .* transfer evaluate$"):
        read_description(place)


@pytest.mark.parametrize("fault", ["flipped", "gone"])
def test_a_complete_run_is_complete_with_its_weights_alone(quick, fault):
    config = LabelerConfig(**quick | {"epochs": 1})
    train_labeler(config)
    weights = Path(quick["out"]) / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    if fault == "gone":
        weights.unlink()
    else:
        weights.write_bytes(data)
    with pytest.raises(FormatError, match=r"weights.safetensors.*`resume=False`"):
        train_labeler(config)
    assert train_labeler(replace(config, resume=False))["epochs"] == 1 and weights.is_file()


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def test_nothing_in_a_state_is_run(quick, tmp_path):
    """A run's folder may come from somebody else: of a pickle, only tensors and plain values are read."""
    config = LabelerConfig(**quick | {"epochs": 1})
    train_labeler(config)
    (Path(quick["out"]) / "summary.json").unlink()
    torch.save({"at": Payload(tmp_path / "was-here"), "model": {}}, Path(quick["out"]) / "state.pt")
    with pytest.raises(FormatError, match=r"state.pt is damaged \(UnpicklingError: .*`resume=False`"):
        train_labeler(config)
    assert not (tmp_path / "was-here").exists()


@pytest.mark.parametrize("resume", [True, False])
def test_another_programs_config_json_is_no_run(quick, resume):
    """Hugging Face models have a file of that name, and may have one that is called as a run's weights, too."""
    Path(quick["out"]).mkdir()
    (Path(quick["out"]) / "config.json").write_text('{"architectures": ["ViTModel"]}')
    with pytest.raises(InputError, match="is not empty and holds no run; choose another `out`"):
        train_labeler(LabelerConfig(**quick | {"resume": resume}))
    assert [path.name for path in Path(quick["out"]).iterdir()] == ["config.json"]
