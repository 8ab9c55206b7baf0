"""Stages 1 and 2 in one go: a labeler, its dumped labels, and students of every kind."""

import json
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig
from stl_offline.dump import Labelling, dump_labels, top_k_labels
from stl_offline.errors import InputError, JoinError, StlError, TargetError
from stl_offline.evaluation import evaluate
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge_views
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.models import load_model
from stl_offline.training.engine import Trainer
from stl_offline.training.label_sources import check_labels, how_read, open_labels
from stl_offline.training.online import online_targets
from stl_offline.training.setup import prepare
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import StudentObjective, train_student


@pytest.fixture(scope="module")
def labelled(stripes, tmp_path_factory):
    """A trained labeler with a set of whole-image labels and one of three views."""
    folder = tmp_path_factory.mktemp("labelled")
    run = {"data": str(stripes[0]), "img_size": 32, "epochs": 1, "batch_size": 15, "workers": 1, "device": "cpu"}
    train_labeler(LabelerConfig(out=str(folder / "labeler"), **run))
    dump = DumpConfig(
        data=str(stripes[0]),
        labeler=str(folder / "labeler"),
        out=str(folder / "whole"),
        shards=3,
        top_k=2,
        batch_size=4,
        workers=1,
        device="cpu",
    )
    dump_labels(dump)
    dump_labels(replace(dump, out=str(folder / "views"), crops_per_image=3))
    return folder, dump


@pytest.mark.parametrize(("changes", "told"), [({}, 0), ({"scale_min": 0.08}, 1), ({"flip": 0.0}, 1)])
def test_a_student_that_replays_crops_is_told_which_settings_have_no_say(quick, labelled, caplog, changes, told):
    for labels, lines in (("whole", 0), ("views", told)):
        config = StudentConfig(**quick | {"labels": str(labelled[0] / labels)} | changes)
        caplog.clear()
        open_labels(config, prepare(config, "student"))
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == lines
        assert all("[0.25, 1.0]" in line and "have no effect" in line for line in said)


@pytest.mark.parametrize("labels", [("whole",), ("views", "whole"), ("online",)])
def test_a_student_that_was_stopped_ends_with_the_same_weights(quick, labelled, tmp_path, monkeypatch, labels):
    """In the fourth of six steps; labels are drawn anew in every epoch, and so is the set that an image reads."""
    sets = labels if labels == ("online",) else tuple(str(labelled[0] / name) for name in labels)
    config = StudentConfig(
        **quick | {"labels": sets, "mixup": 0.8, "random_erase": 0.3},
        labeler=str(labelled[0] / "labeler") if labels == ("online",) else None,
    )
    whole = replace(config, out=str(tmp_path / "whole"))
    train_student(whole)
    steps = 0
    original = StudentObjective.losses

    def stop_in_the_fourth(*arguments):
        nonlocal steps
        steps += 1
        if steps == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StudentObjective, "losses", stop_in_the_fourth)
        with pytest.raises(SystemExit):
            train_student(config)
    assert torch.load(Path(config.out) / "state.pt", weights_only=True)["at"]["step"] == 4
    train_student(config)
    ours, theirs = (load_file(Path(run.out) / "weights.safetensors") for run in (whole, config))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("target", ["gumbel", "soft", "argmax"])
@pytest.mark.parametrize(
    ("labels", "residual"), [("whole", "ignore"), ("views", "uniform"), ("views", "class"), ("whole", "ghost")]
)
def test_dumped_labels_train_a_student(quick, labelled, labels, residual, target):
    residual = "ignore" if target == "argmax" else residual  # the best class leaves nothing
    config = StudentConfig(
        labels=str(labelled[0] / labels), token_target=target, residual=residual, mixup=0.8, cutmix=1.0, **quick
    )
    summary = train_student(config)
    entry = json.loads((Path(quick["out"]) / "log.jsonl").read_text().splitlines()[-1])
    assert entry["token_loss"] > 0
    assert 0.3 < entry["labelled"] <= 1 + 1e-6
    assert 0 <= summary["token_top1"] <= 1
    scores = evaluate(EvaluateConfig(data=quick["val"], checkpoint=quick["out"], device="cpu", workers=1))
    assert scores["top1"] == pytest.approx(summary["top1"])
    assert scores["samples"] == 18


@pytest.mark.parametrize(("draws", "target"), [({"draws": 1}, "gumbel"), ({"draws": 4, "top_k": 1}, "soft")])
def test_draws_train_a_student(quick, labelled, tmp_path, draws, target):
    """Each view is labelled by classes drawn from the whole distribution, so that all tokens have a target."""
    settings = {"crops_per_image": 2, "class_draws": 2, "shards": 1, "device": "cpu", "workers": 1} | draws
    dump = DumpConfig(data=quick["data"], labeler=str(labelled[0] / "labeler"), out=str(tmp_path / "set"), **settings)
    dump_labels(dump)
    config = StudentConfig(labels=dump.out, token_target=target, class_target="mix:0.5", mixup=0.8, **quick)
    train_student(config)
    entry = json.loads((Path(quick["out"]) / "log.jsonl").read_text().splitlines()[-1])
    assert entry["labelled"] == pytest.approx(1, abs=1e-3) and entry["token_loss"] > 0


@pytest.mark.parametrize("target", ["gumbel", "soft"])
def test_only_tokens_of_the_own_class_are_trained_on(quick, labelled, monkeypatch, target):
    seen = []
    original = StudentObjective.inputs

    def look(objective, batch, random):
        inputs = original(objective, batch, random)
        seen.append((batch.class_ids, inputs.token_ids, inputs.token_weights))
        return inputs

    monkeypatch.setattr(StudentObjective, "inputs", look)
    labels = str(labelled[0] / "whole")
    train_student(StudentConfig(labels=labels, token_target=target, select="own", **quick | {"epochs": 1}))
    (own, ids, weights) = (torch.cat(parts) for parts in zip(*seen, strict=True))
    kept = weights.sum(-1) > 0
    assert (ids[..., 0][kept] == own[:, None].expand_as(kept)[kept]).all()
    assert 0 < kept.float().mean() < 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "mine"}, '`select` must be "all", "own" or "confident:X", got \'mine\''),
        ({"select": "confident:2"}, r"confident:X with X in \(0, 1\]"),
        ({"select": "confident:x"}, r"confident:X with X in \(0, 1\]"),
        ({"select": "confident:0.5", "min_confidence": 0.2}, "give one of them"),
        ({"select": "own", "labels": "none"}, "`select` needs token labels"),
    ],
)
def test_selections_that_cannot_be(settings, message):
    with pytest.raises(InputError, match=message):
        StudentConfig(**{"data": "d", "out": "o", "labels": "l", **settings})


def test_a_confident_selection_is_a_minimum_confidence():
    config = StudentConfig(data="d", out="o", labels="l", select="confident:0.25")
    assert (config.min_confidence, config.select) == (0.25, "all")
    assert replace(config) == config


@pytest.mark.parametrize("target", ["gumbel", "soft", "argmax"])
def test_the_labeler_can_run_in_every_step(quick, labelled, target):
    labeler = str(labelled[0] / "labeler")
    summary = train_student(StudentConfig(labels="online", labeler=labeler, token_target=target, **quick))
    assert summary["epochs"] == 2


def test_the_labeler_in_a_step_runs_in_the_steps_precision(quick, labelled, monkeypatch):
    found = []

    def look(labeler, *arguments):
        logits = labeler(arguments[0])[1]
        found.append((torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None, logits.dtype))
        return online_targets(labeler, *arguments)

    monkeypatch.setattr("stl_offline.training.label_sources.online_targets", look)
    labeler = str(labelled[0] / "labeler")
    train_student(StudentConfig(labels="online", labeler=labeler, **quick | {"epochs": 1, "amp": "bf16"}))
    assert set(found) == {(torch.bfloat16, torch.float32)}


def test_no_labels_train_the_same_model(quick):
    train_student(StudentConfig(labels="none", **quick))
    entry = json.loads((Path(quick["out"]) / "log.jsonl").read_text().splitlines()[-1])
    assert entry["loss"] == entry["class_loss"]
    assert "token_loss" not in entry
    assert entry["token_top1"] is None  # of a head that nothing taught


@pytest.mark.parametrize("settings", [{"labels": "none"}, {"labels": "online", "token_weight": 0.0}])
def test_an_untrained_token_head_is_not_scored(quick, labelled, settings):
    """Its mean token would give the accuracy of a guess: the weights record that nothing trained it."""
    if settings["labels"] == "online":
        settings |= {"labeler": str(labelled[0] / "labeler")}
    train_student(StudentConfig(**quick | {"epochs": 1} | settings))
    config = EvaluateConfig(data=quick["val"], checkpoint=quick["out"], workers=1, device="cpu")
    scores = evaluate(config)
    assert scores["token_top1"] is None
    assert scores["top1"] is not None
    assert load_model(quick["out"])[1].token_head_trained is False


def test_online_draws_follow_the_labelers_softmax():
    logits = torch.tensor([[[2.0, 0.0, 1.0, -1.0]]]).expand(1, 20_000, 4)
    ids, weights = online_targets(
        lambda images: (None, logits), torch.zeros(1, 3, 8, 8), "gumbel", 2, "ignore", torch.Generator().manual_seed(5)
    )
    counts = torch.bincount(ids.flatten(), minlength=4)
    expected = logits[0, 0].softmax(dim=0) * 20_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.3  # chi-square, 3 degrees of freedom, p = 0.001
    assert torch.equal(weights, torch.ones(1, 20_000, 1))


@pytest.mark.parametrize(("residual", "last"), [("uniform", [-1, -1]), ("class", [2, 1]), ("ghost", [-2, -2])])
def test_what_soft_online_labels_leave_over(residual, last):
    probabilities = torch.tensor([[[0.6, 0.3, 0.1]], [[0.35, 0.4, 0.25]]])
    ids, weights = online_targets(
        lambda images: (None, probabilities.log()),
        torch.zeros(2, 3, 8, 8),
        "soft",
        2,
        residual,
        torch.Generator(),
        class_ids=torch.tensor([2, 1]),
    )
    assert ids[:, 0].tolist() == [[0, 1, last[0]], [1, 0, last[1]]]
    torch.testing.assert_close(weights[:, 0], torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25]]))


@pytest.mark.parametrize(("kind", "m"), [("gumbel", 1), ("argmax", 1), ("soft", 3)])
def test_online_labels_of_unsure_tokens_weigh_nothing(kind, m):
    probabilities = torch.tensor([[[0.6, 0.3, 0.1], [0.35, 0.4, 0.25]], [[0.1, 0.1, 0.8], [0.34, 0.33, 0.33]]])
    found = [
        online_targets(
            lambda images: (None, probabilities.log()),
            torch.zeros(2, 3, 8, 8),
            kind,
            2,
            "uniform",
            torch.Generator().manual_seed(1),
            least,
        )
        for least in (0.0, 0.5)
    ]
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].shape == (2, 2, m)
    torch.testing.assert_close(found[0][1].sum(dim=-1), torch.ones(2, 2))
    torch.testing.assert_close(found[1][1].sum(dim=-1), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_a_dump_holds_what_the_labeler_says(labelled, stripes):
    """The labels against the labeler's own output on the same crops, loaded one image at a time."""
    from stl_offline.models import create_labeler

    folder, _ = labelled
    labeler = create_labeler(str(folder / "labeler"))
    beton = ensure_beton(str(stripes[0]))
    label_set = open_label_set(folder / "views")
    loader = TokenLoader(beton, ImageSettings((32, 32), labeler.mean, labeler.std), 1, shuffle=False)
    for view in range(3):
        views = np.stack([label_set[key].views[view] for key in beton.keys])
        for batch in loader.epoch(0, views):
            label_map = label_set[beton.keys[int(batch.sample_ids[0])]]
            with torch.inference_mode():
                expected = labeler(batch.images)[1].softmax(dim=-1)[0].numpy().reshape(4, 4, 3)
            found = np.take_along_axis(expected, label_map.class_ids[view].astype(np.int64), axis=-1)
            np.testing.assert_allclose(label_map.probabilities()[view], found, rtol=5e-3, atol=1e-4)
            assert (label_map.class_ids[view, :, :, 0] == expected.argmax(axis=-1)).mean() > 0.95


def test_the_same_dump_in_two_parts_gives_the_same_bytes(labelled, tmp_path, monkeypatch):
    folder, config = labelled
    config = replace(config, out=str(tmp_path / "again"))
    written = 0
    original = Labelling._read

    def fail_in_the_second_shard(*arguments):
        nonlocal written
        written += 1
        if written == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Labelling, "_read", fail_in_the_second_shard)
        with pytest.raises(KeyboardInterrupt):
            dump_labels(config)
    with pytest.raises(StlError, match="1 of 3"):
        open_label_set(config.out)
    report = dump_labels(config)
    assert report.labelled == 30
    ours = {path.name: path.read_bytes() for path in Path(config.out).iterdir()}
    assert ours == {path.name: path.read_bytes() for path in (folder / "whole").iterdir()}
    assert dump_labels(config).labelled == 0


def test_top_k_and_confidence_equal_the_softmax():
    logits = torch.randn(2, 5, 9)
    ids, values, confidence = top_k_labels(logits.bfloat16(), 4)
    probabilities = logits.bfloat16().float().softmax(dim=-1)
    torch.testing.assert_close(confidence, probabilities.max(dim=-1).values)
    torch.testing.assert_close(confidence[..., None] * (values - values[..., :1]).exp(), probabilities.gather(2, ids))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 4}, "the labeler has only 3 classes"),
        ({"shards": 46}, "more than the 45 images"),
        ({"labeler": "nowhere"}, "no run and no checkpoint at nowhere"),
        ({"labeler": "timm:resnet18"}, "needs weights"),
        ({"labeler": "timm:no_such_net", "labeler_checkpoint": "x"}, "timm's registry"),
    ],
)
def test_dumps_that_cannot_be_are_refused(labelled, tmp_path, change, message):
    config = replace(labelled[1], out=str(tmp_path / "set"), **change)
    with pytest.raises(StlError, match=message):
        dump_labels(config)
    assert not (tmp_path / "set").exists()


def test_another_job_in_the_same_folder_is_refused_by_name(labelled):
    with pytest.raises(TargetError, match="top_k"):
        dump_labels(replace(labelled[1], top_k=1))


class TestLabelsThatDoNotBelong:
    def student(self, quick, labelled, **changes):
        return train_student(StudentConfig(**quick | {"labels": str(labelled[0] / "whole")} | changes))

    def test_missing_keys(self, quick, labelled, stripes, tmp_path, make_stripes):
        more = make_stripes(tmp_path / "more", 16, 1)
        with pytest.raises(JoinError, match=r"3 .*045|015\.jpg"):
            self.student(quick, labelled, data=str(more))
        summary = self.student(quick, labelled, data=str(more), missing="skip")
        assert summary["epochs"] == 2

    def test_changed_images(self, quick, labelled, tmp_path, make_stripes):
        changed = make_stripes(tmp_path / "changed", 15, 9)
        with pytest.raises(JoinError, match="45"):
            self.student(quick, labelled, data=str(changed))
        assert self.student(quick, labelled, data=str(changed), allow_changed=True)["epochs"] == 2

    def test_the_same_files_in_a_tar(self, quick, labelled, stripes, tmp_path, capsys):
        """Their keys have no file ending; the message of the command names the option that joins them."""
        source = tmp_path / "mate.tar"
        with tarfile.open(source, "w") as archive:
            archive.add(stripes[0], "data/train")
        with pytest.raises(JoinError, match='45 of 45 images match by content: `match="content"` joins them'):
            self.student(quick, labelled, data=str(source))
        words = f"train-student --data {source} --labels {labelled[0] / 'whole'} --out {quick['out']} --img-size 32"
        assert main([*words.split(), "--device", "cpu"]) == 1
        assert "--match content joins them" in capsys.readouterr().err
        by_content = self.student(quick, labelled, data=str(source), match="content")
        by_key = self.student(quick, labelled, out=f"{quick['out']}-key")
        assert by_content["loss"] == by_key["loss"]
        with pytest.raises(InputError, match="match: 'content' → 'stem'"):
            self.student(quick, labelled, data=str(source), match="stem")

    def test_other_classes(self, quick, labelled, tmp_path, make_stripes):
        other = make_stripes(tmp_path / "other", 15, 1)
        (other / "diagonal").rename(other / "slanted")
        with pytest.raises(StlError, match="slanted|diagonal"):
            self.student(quick, labelled, data=str(other), val=None)

    def test_replay_without_stored_crops(self, quick, labelled):
        with pytest.raises(InputError, match="no crops to replay"):
            self.student(quick, labelled, crops="replay")

    def test_random_crops_of_stored_crops(self, quick, labelled):
        with pytest.raises(InputError, match="labels of 3 crops"):
            self.student(quick, labelled, labels=str(labelled[0] / "views"), crops="random")

    def test_no_label_set(self, quick, labelled, tmp_path):
        with pytest.raises(StlError, match="label set"):
            self.student(quick, labelled, labels=str(tmp_path))

    def test_grids_that_differ_are_aligned_offline_and_refused_online(self, quick, labelled):
        assert self.student(quick, labelled, img_size=48)["epochs"] == 2
        changes = {"labels": "online", "labeler": str(labelled[0] / "labeler"), "model": "fan_tiny_12_p16_224"}
        changes["out"] = f"{quick['out']}-online"
        with pytest.raises(InputError, match="equal grids"):
            self.student(quick, labelled, **changes)


def test_views_as_they_are_needed_train_the_same_student(quick, labelled, monkeypatch, tmp_path, caplog):
    """One view of three on disk for each epoch gives the weights of a run with all three, also after a kill. That its
    shards, with all three in each, are read three times is logged."""
    config = StudentConfig(**quick | {"labels": str(labelled[0] / "views"), "epochs": 5, "val": None})
    train_student(replace(config, out=str(tmp_path / "whole")))
    assert "views_per_part" not in caplog.text
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("stl_offline.labels.views_ahead.SPAN_BYTES", 1)
    seen = []
    original = Trainer._take_step

    def die_in_the_third_epoch(trainer, batch, notes):
        spans = sorted(path.name.partition("-")[2] for path in (tmp_path / "cache" / "tokens").glob("*-*"))
        seen.append((trainer.at.epoch, len(spans)))
        assert f"{trainer.at.epoch % 3}-{trainer.at.epoch % 3}" in spans
        if len(seen) == 8:
            raise KeyboardInterrupt
        return original(trainer, batch, notes)

    monkeypatch.setattr(Trainer, "_take_step", die_in_the_third_epoch)
    spans = replace(config, out=str(tmp_path / "spans"), checkpoint_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_student(spans)
    train_student(spans)
    told = [record.getMessage() for record in caplog.records if "`convert(views_per_part=1)`" in record.getMessage()]
    assert len(told) == 2 and "hold 1 of its 3 views each" in told[0]
    assert [epoch for epoch, _ in seen] == [0] * 3 + [1] * 3 + [2] * 2 + [2] * 2 + [3] * 3 + [4] * 3
    assert max(count for _, count in seen) == 2
    ours, theirs = (load_model(tmp_path / name)[0].state_dict() for name in ("spans", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_sets_of_different_views_train_as_one(quick, labelled, tmp_path):
    """Two dumps of one family of crops, in any order, and both merged: the student of the one dump with all views."""
    folder, dump = labelled
    early = replace(dump, out=str(tmp_path / "early"), crops_per_image=2, shards=2)
    late = replace(dump, out=str(tmp_path / "late"), crops_per_image=1, first_view=2, shards=1)
    for each in (early, late):
        dump_labels(each)
    merge_views([open_label_set(late.out), open_label_set(early.out)], tmp_path / "merged")
    weights = []
    for number, labels in enumerate((str(folder / "views"), (late.out, early.out), str(tmp_path / "merged"))):
        changes = {"labels": labels, "epochs": 3, "val": None, "out": str(tmp_path / f"run{number}")}
        train_student(StudentConfig(**quick | changes))
        weights.append(load_model(tmp_path / f"run{number}")[0].state_dict())
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in other)
    with pytest.raises(InputError, match="both hold the views 0-1"):
        check_labels(StudentConfig(**quick | {"labels": (early.out, str(tmp_path / "merged"))}))
    # A choice between sets that is asked for is made.
    several = StudentConfig(**quick | {"labels": (late.out, early.out), "labels_share": (1.0, 2.0)})
    assert how_read([open_label_set(place) for place in several.labels], several)[0] == [True, True]
