"""What a dump refuses: before images are packed where that is possible, and never by writing a wrong label."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import Labelling, dump_labels, estimate_dump, load_labeler, tars
from stl_offline.errors import FormatError, InputError, StlError, TargetError
from stl_offline.images.beton import open_beton
from stl_offline.labels.label_set import open_label_set
from tests.training.conftest import CLASSES


@pytest.fixture
def no_packing(monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("images were packed")

    for packing in ("ensure_beton", "encode_all"):
        monkeypatch.setattr(tars, packing, never)


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "w.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=len(CLASSES)).state_dict(), path)
    return str(path)


@pytest.mark.usefixtures("no_packing")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labeler": "nowhere"}, "no run and no checkpoint at nowhere"),
        ({"labeler": "timm:no_such_model"}, "not timm:NAME"),
        ({"labeler": "timm:test_vit", "labeler_checkpoint": "no.pth"}, "no weights file at no.pth"),
        ({"img_size": 36}, "multiples of 8; the nearest sizes that work: 32 and 40"),
        ({"img_size": 4}, "the nearest sizes that work: 8 and 16"),
        ({"top_k": 9}, "`top_k` is 9, but the labeler has only 3 classes"),
    ],
)
def test_settings_are_checked_before_packing(work, tmp_path, changes, reason):
    config = DumpConfig(**work | changes, out=str(tmp_path / "set"))
    for command in (dump_labels, estimate_dump):
        with pytest.raises(StlError, match=reason):
            command(config)
    assert not (tmp_path / "set").exists()


@pytest.mark.usefixtures("no_packing")
def test_the_output_folder_is_checked_before_packing(work, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for place, reason in (
        ("file", "file is not a folder"),
        ("other", "thesis.txt lies there"),
        ("file/set", "file is not a folder"),
        ("dangling", "dangling is not a folder"),
    ):
        with pytest.raises(TargetError, match=reason):
            dump_labels(DumpConfig(**work, out=str(tmp_path / place)))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".partial").symlink_to(tmp_path / "other")
    with pytest.raises(FormatError, match=r"\.partial is a symbolic link"):
        dump_labels(DumpConfig(**work, out=str(tmp_path / "linked")))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]


def test_class_ids_outside_the_class_list_are_never_written(work, tmp_path):
    config = DumpConfig(**work, out=str(tmp_path / "set"))
    beton = open_beton(work["data"])
    labeler = load_labeler(config)
    for wrong in (-1, len(CLASSES)):
        class_ids = beton.class_ids.copy()
        class_ids[7] = wrong
        with pytest.raises(FormatError, match=rf"1 of the 45 images .* outside 0 … 2, the first is .* with {wrong}"):
            Labelling(config, labeler, dataclasses.replace(beton, class_ids=class_ids), torch.device("cpu"))


def test_logits_that_are_not_finite_name_the_image(work, tmp_path):
    config = DumpConfig(**work, out=str(tmp_path / "set"))
    labelling = Labelling(config, load_labeler(config), open_beton(work["data"]), torch.device("cpu"))
    forward = labelling.labeler.forward

    def broken(images):
        class_logits, token_logits = forward(images)
        token_logits[1, 3, 0] = torch.nan
        return class_logits, token_logits

    labelling.labeler.forward = broken
    with pytest.raises(InputError, match=f"not finite for 1 of 2 images, the first is '{labelling.beton.keys[5]}'"):
        labelling.label(np.array([4, 5]), lambda done: None)


def test_keys_that_no_label_set_can_hold_are_refused_before_labelling(work, tmp_path):
    """Earlier releases packed them, and a dump failed when it wrote the shard."""
    beton = open_beton(work["data"])
    config = DumpConfig(**work, out=str(tmp_path / "set"))
    odd = dataclasses.replace(beton, keys=["a\x1b[2J.jpg", *beton.keys[1:]])
    with pytest.raises(FormatError, match="is no key: it must be a path"):
        Labelling(config, load_labeler(config), odd, torch.device("cpu"))


def test_a_timm_labeler_with_classes_of_its_own(capsys, work, vit_file, tmp_path):
    names = tmp_path / "names.txt"
    names.write_bytes(("\ufeff" + "\r\n".join(CLASSES) + "\r\n").encode())
    options = ["--data", work["data"], "--labeler", "timm:test_vit", "--labeler-checkpoint", vit_file]
    options += ["--img-size", "32", "--top-k", "2", "--device", "cpu", "--workers", "1"]
    assert main(["dump-labels", *options, "--out", str(tmp_path / "set")]) == 1
    assert "have no names" in (error := capsys.readouterr().err) and "--labeler-classes" in error
    assert main(["dump-labels", *options, "--labeler-classes", str(names), "--out", str(tmp_path / "set")]) == 0
    label_set = open_label_set(tmp_path / "set")
    assert label_set.spec.class_names == tuple(CLASSES)
    assert not {"labeler_classes", "labeler_pretrained"} & label_set.spec.creation.keys()
    # A label set names classes, too, and `labels verify --recompute` takes the same options.
    again = ["labels", "verify", str(tmp_path / "set"), "--recompute", "5", "--labeler-classes", str(tmp_path / "set")]
    capsys.readouterr()
    assert main([*again, "--data", work["data"], *options[2:6], "--device", "cpu"]) == 0, capsys.readouterr().err
