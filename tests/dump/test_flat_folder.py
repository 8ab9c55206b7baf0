"""Images without classes, from the flat folder to the page: labelled, and nowhere given a class."""

import json
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from stl_offline.cli.main import main
from stl_offline.errors import FormatError, InputError, JoinError
from stl_offline.evaluation import match_classes
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.foreground import measure_foreground
from stl_offline.labels.join import join
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.stats import measure
from stl_offline.labels.suspects import find_suspects
from tests.labels.synthetic import make_spec, write_set

IMAGES = 7


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """(folder of images, label set): labelled by a timm model of random weights, with ImageNet's class list."""
    folder = tmp_path_factory.mktemp("flat")
    (folder / "images").mkdir()
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 52 + number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = timm.create_model("test_vit")
    save_file(model.state_dict(), folder / "model.safetensors")
    words = f"dump-labels --data {folder / 'images'} --labeler timm:test_vit --labeler-checkpoint "
    words += f"{folder / 'model.safetensors'} --img-size 64 --device cpu --workers 1 --out {folder / 'set'}"
    assert main(words.split()) == 0
    return folder / "images", folder / "set"


def run(capsys, *words):
    capsys.readouterr()
    code = main([*map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def test_the_set_has_the_labelers_classes_and_the_images_none(flat):
    labels = open_label_set(flat[1])
    assert labels.spec.num_classes == 1000 and "unlabelled" not in labels.spec.class_names
    assert not labels.spec.has_own_classes and labels.spec.source["own_classes"] is False
    assert len(labels) == IMAGES
    assert labels["3.png"].class_id is None
    assert {each.class_id for each in labels.values()} == {None}


def test_every_command_reads_it_and_compares_with_no_class(flat, tmp_path, capsys):
    images, labels = flat
    assert "images without classes" in run(capsys, "labels", "inspect", labels)
    assert "its shard is whole (7 images)" in run(capsys, "labels", "verify", labels)
    assert "agreement:    none: the images have no classes" in run(capsys, "labels", "stats", labels)
    values = json.loads(run(capsys, "labels", "stats", labels, "--json"))
    assert [values[name] for name in ("agreement", "agreement_top_k", "image_agreement")] == [None] * 3
    packed = tmp_path / "flat.beton"
    run(capsys, "pack", images, packed)
    archive = tmp_path / "flat.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(images, "train")
    for name, source, options in (("folder", images, []), ("beton", packed, []), ("tar", archive, ["--match", "stem"])):
        out = tmp_path / name
        run(capsys, "labels", "preview", labels, "--data", source, *options, "--samples", 2, "--out", out)
        page = (out / "labels.html").read_text()
        assert "own class" not in page and "the image's class" not in page and "of the class" not in page
    checked = run(
        capsys,
        *("labels", "verify", labels, "--recompute", 3, "--data", images, "--labeler", "timm:test_vit"),
        *("--labeler-checkpoint", images.parent / "model.safetensors", "--device", "cpu", "--workers", 1),
    )
    assert "3 images labelled again; 100.00% of" in checked
    run(capsys, "labels", "convert", labels, tmp_path / "converted", "--format", "webdataset", "--encoding", "q8")
    assert not open_label_set(tmp_path / "converted").spec.has_own_classes


def test_what_needs_classes_is_refused(flat, tmp_path):
    images, place = flat
    labels = open_label_set(place)
    with pytest.raises(InputError, match="have no classes"):
        find_suspects(labels, 3)
    with pytest.raises(InputError, match="have no classes"):
        measure_foreground(labels, {"3.png": np.ones((4, 4), dtype=bool)})
    with pytest.raises(JoinError, match="has no class folders: its images have no classes to compare the model with"):
        match_classes(ensure_beton(images), labels.spec.class_names, "the model")
    assert measure(labels).agreement is None


def test_images_with_classes_are_joined_with_it(flat):
    labels = open_label_set(flat[1])
    hashes = np.array([labels[key].content_hash for key in labels], dtype=np.uint64)
    keys = [f"{labels.spec.class_names[number]}/{key}" for number, key in enumerate(labels)]
    assert join(labels, keys, hashes, labels.spec.class_names, match="content").matched == IMAGES


def test_sets_with_and_without_classes_are_not_merged(tmp_path):
    source = {"samples": 6, "fingerprint": "x"}
    for name, more in (("with", {}), ("without", {"own_classes": False})):
        write_set(tmp_path / name, make_spec(source=source | more), 1)
    sets = [open_label_set(tmp_path / name) for name in ("with", "without")]
    with pytest.raises(InputError, match="source.own_classes is null and false"):
        merge(sets, tmp_path / "out")


@pytest.mark.parametrize("value", [0, None, "no", []])
def test_an_odd_entry_is_refused(value):
    entries = make_spec().to_json()
    entries["source"] = entries["source"] | {"own_classes": value}
    with pytest.raises(FormatError, match="own_classes must be true or false"):
        LabelSpec.from_json(entries)
