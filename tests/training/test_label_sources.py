"""Several label sets at once: which one a sample reads, and that it reads it; strong augmentation in whole runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.config import StudentConfig
from stl_offline.errors import InputError, JoinError
from stl_offline.geometry import whole_views
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.training.label_choice import ChooseByDraw, ChooseByZoom, choose_between
from stl_offline.training.label_sources import open_labels
from stl_offline.training.setup import make_train_loader, prepare
from stl_offline.training.train_student import train_student
from tests.labels.synthetic import make_spec

WHOLE = [1, 0, 0, 0, 1, 0]


def crop(width, height=None):
    return [width, 0, 0.1, 0, height or width, 0.2]


@pytest.fixture(scope="module")
def make_set(stripes, tmp_path_factory):
    """make_set(name, says, side, maps=1, leave_out=0, …) → a label set that says one class (or two, half each)."""
    beton = ensure_beton(str(stripes[0]))

    def make(
        name, says, side, grid=(4, 4), maps=1, leave_out=0, labeler="0" * 64, class_names=beton.class_names, draws=()
    ):
        path = tmp_path_factory.mktemp("sets") / name
        samples = len(beton) - leave_out
        kept = 0 if draws else 1
        kind = {"draws": len(draws), "has_confidence": not draws}
        spec = make_spec(samples, len(class_names), grid, kept, maps, class_names=tuple(class_names), **kind)
        preprocessing = spec.preprocessing | {"height": side, "width": side}
        spec = replace(spec, preprocessing=preprocessing, labeler=spec.labeler | {"weights_sha256": labeler})
        views = np.tile(whole_views(1), (samples, maps, 1))
        if maps > 1:
            for index in range(maps):
                views[:, index] = crop(0.5 + 0.1 * index)
        arrays = ShardArrays(
            keys=list(beton.keys[:samples]),
            content_hash=np.array(beton.content_hashes[:samples]),
            class_id=np.array(beton.class_ids[:samples], dtype=np.uint32),
            views=views.astype(np.float32),
            class_ids=np.full((samples, maps, *grid, kept), says or 0, dtype=np.uint16),
            logits=np.zeros((samples, maps, *grid, kept), dtype=np.float16),
            confidence=None if draws else np.ones((samples, maps, *grid), dtype=np.float16),
            draws=np.tile(np.array(draws, dtype=np.uint16), (samples, maps, *grid, 1)) if draws else None,
        )
        with LabelSetWriter(path, spec, 1) as writer:
            for shard in writer.todo():
                writer.write_shard(shard, arrays)
            writer.finish()
        return str(path)

    return make


def source_of(quick, labels, **changes):
    config = StudentConfig(**quick | {"val": None, "labels": labels} | changes)
    stage = prepare(config, "student")
    return stage, open_labels(config, stage)


def said(stage, source, epoch):
    """What each sample's labels say in an epoch of the real loader (−1: nothing), and the epoch's plan."""
    plan = source.plan(epoch)
    classes = np.full(len(stage.train), -1)
    for batch in make_train_loader(stage, source.loader_labels()).epoch(epoch, **plan):
        found = batch.token_ids.flatten(1)
        assert (found == found[:, :1]).all()
        classes[batch.sample_ids.numpy()] = found[:, 0].numpy()
    return classes, plan


def test_zoom_chooses_the_side_that_fits():
    choose = ChooseByZoom((448.0, 896.0, 640.0))
    views = np.array([WHOLE, crop(0.5), crop(0.71), crop(-0.9, 0.95), crop(0.3, 0.2), crop(0.9)], dtype=np.float32)
    every = np.ones((3, len(views)), dtype=bool)
    assert choose(0, views, every).tolist() == [0, 1, 2, 0, 1, 0]
    every[1] = False
    every[:, 2] = False
    assert choose(0, views, every).tolist() == [0, 2, 0, 0, 2, 0]


def test_draws_come_in_the_stated_shares():
    views = np.tile(np.array(WHOLE, dtype=np.float32), (20_000, 1))
    labelled = np.ones((3, len(views)), dtype=bool)
    choose = ChooseByDraw((2.0, 1.0, 1.0), seed=4)
    drawn = choose(3, views, labelled)
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.5, 0.25, 0.25], atol=0.015)
    np.testing.assert_array_equal(choose(3, views[:10], labelled[:, :10]), drawn[:10])
    assert 0.5 < (choose(4, views, labelled) != drawn).mean() < 0.7
    labelled[1, ::2] = False
    labelled[:, 0] = False
    parted = choose(3, views, labelled)
    assert not (parted[::2] == 1).any()
    assert parted[0] == 0
    np.testing.assert_array_equal(parted[1::2], drawn[1::2])


def test_each_sample_reads_the_map_of_its_zoom(quick, make_set):
    sets = (make_set("small", 0, 32), make_set("large", 2, 64, grid=(8, 6)))
    stage, source = source_of(quick, sets)
    for epoch in (0, 1):
        classes, plan = said(stage, source, epoch)
        area = np.abs(plan["views"][:, 0] * plan["views"][:, 4])
        np.testing.assert_array_equal(classes, np.where(area < 0.5, 2, 0))
        assert len(set(classes.tolist())) == 2


def test_whole_images_of_one_labeler_and_crops_of_another(quick, make_set):
    sets = (make_set("whole", 1, 32), make_set("crops", 2, 32, maps=3, leave_out=9, labeler="1" * 64))
    stage, source = source_of(quick, sets, labels_share=(1, 3), missing="skip")
    shares = []
    for epoch in range(4):
        classes, plan = said(stage, source, epoch)
        assert (classes[-9:] == 1).all()
        replayed = np.array(crop(0.5 + 0.1 * (epoch % 3)), dtype=np.float32)
        np.testing.assert_array_equal((plan["views"] == replayed).all(axis=1), classes == 2)
        shares.append((classes[:-9] == 2).mean())
    assert 0.6 < np.mean(shares) < 0.9


def test_soft_targets_that_drop_drawn_classes_are_told_how_much(quick, make_set, caplog):
    """Eight draws of a token, whole images under fresh crops: 5, 2 and 1 of three classes."""
    drawn = make_set("drawn", None, 32, draws=[0, 1, 0, 2, 0, 1, 0, 0])
    for changes, told in (
        ({"token_target": "soft", "soft_classes": 1}, "the 1 most probable .* drop 38% .*; 3 classes"),
        ({"token_target": "soft", "soft_classes": 2}, "the 2 most probable .* drop 12% .*; 3 classes"),
        ({"token_target": "soft", "soft_classes": 3}, None),
        ({}, None),
    ):
        caplog.clear()
        _, source = source_of(quick, drawn, **changes)
        source.plan(0)
        source.plan(1)
        lines = [record.getMessage() for record in caplog.records if "soft targets" in record.getMessage()]
        assert len(lines) == (told is not None)
        if told:
            assert re.search(told, lines[0])


def test_choices_that_cannot_be(quick, make_set):
    small, large = make_set("small", 0, 32), make_set("large", 0, 64)
    other, crops = make_set("other", 0, 64, labeler="1" * 64), make_set("crops", 0, 48, maps=2)
    sets = {name: open_label_set(path) for name, path in zip("slox", (small, large, other, crops), strict=True)}

    def choose(names, pick="auto", shares=None):
        return choose_between([sets[name] for name in names], pick, shares, 0)

    assert choose("s") is None
    assert isinstance(choose("sl"), ChooseByZoom)
    assert isinstance(choose("so"), ChooseByDraw)
    assert isinstance(choose("so", "zoom"), ChooseByZoom)
    assert isinstance(choose("sx"), ChooseByDraw)
    assert choose("sl", shares=(0.7, 0.3)) == ChooseByDraw((0.7, 0.3), 0)
    with pytest.raises(InputError, match="crops holds crops"):
        choose("sx", "zoom")
    with pytest.raises(InputError, match="large 64 px, .*other 64 px"):
        choose("lo", "zoom")
    names = [*open_label_set(small).spec.class_names]
    strange = make_set("strange", 0, 64, class_names=[names[0], names[2], names[1]])
    with pytest.raises(JoinError, match=f"strange: .*class 1 is '{names[2]}' in the label set"):
        source_of(quick, (small, strange))
    with pytest.raises(InputError, match="small holds labels of whole images, no crops"):
        source_of(quick, (small, crops), crops="replay")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ()}, "at least one"),
        ({"labels": ("a", "online"), "labeler": "x"}, "must all be label sets"),
        ({"labels": "a", "labels_share": (1.0,)}, "`labels_share` needs several `labels`"),
        ({"labels": ("a", "b"), "labels_share": (1.0,)}, "2 positive"),
        ({"labels": ("a", "b"), "labels_share": (1.0, 0.0)}, "2 positive"),
        ({"labels": ("a", "b"), "labels_share": (1.0, float("inf"))}, "2 positive"),
        ({"labels": ("a", "b"), "labels_share": (1.0, 1.0), "labels_pick": "zoom"}, 'other than "zoom"'),
        ({"labels_pick": "best"}, "`labels_pick` must be one of auto, zoom, draw"),
        ({"random_erase": 1.5}, "probability of erasing"),
        ({"erase_mode": "grey"}, "mode of erasing"),
        ({"color_jitter": -1.0}, "`color_jitter` must be at least 0"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(InputError, match=message):
        StudentConfig(data="x", out="y", **changes)


def test_the_command_line_takes_several_sets(capsys):
    call = ["train-student", "--data", "x", "--out", "y", "--labels", "a", "--labels", "b", "--labels-share"]
    assert main([*call, "0.7"]) == 1
    assert "--labels-share must be 2 positive numbers, got (0.7,)" in capsys.readouterr().err
    assert main([*call, "0.7,many"]) == 2
    assert "not a list of numbers with commas" in capsys.readouterr().err


STRONG = {"auto_augment": "rand-m9-n3-mstd0.5-inc1", "random_erase": 0.6, "color_jitter": 0.3}


@pytest.mark.parametrize("erased", ["drop", "keep"])
def test_strong_augmentation_leaves_cells_without_a_source_unlabelled(quick, make_set, erased):
    sets = (make_set("small", 0, 32), make_set("large", 2, 64))
    settings = {"mixup": 0.8, "cutmix": 1.0, "mix_mode": "elem", "batch_size": 13, "erased_labels": erased}
    train_student(
        StudentConfig(**quick | {"labels": sets, "token_target": "soft", "soft_classes": 2} | settings | STRONG)
    )
    entry = json.loads((Path(quick["out"]) / "log.jsonl").read_text().splitlines()[-1])
    assert entry["token_loss"] > 0
    low, high = (0.6, 0.92) if erased == "drop" else (0.7, 0.999)
    assert low < entry["labelled"] < high


def test_an_unknown_policy_is_refused_before_anything_is_packed(quick, tmp_path):
    with pytest.raises(InputError, match="rand-m9-mstd0.5-inc1"):
        train_student(StudentConfig(**quick | {"data": str(tmp_path / "nowhere"), "auto_augment": "augmix"}))
