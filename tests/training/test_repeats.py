"""Several crops of each image in a batch: each is shown as its own epoch shows it, and a run sees as many crops."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.errors import InputError
from stl_offline.training import optimization
from stl_offline.training.dry_run import dry_run
from stl_offline.training.label_sources import check_labels, open_labels
from stl_offline.training.optimization import count_parts
from stl_offline.training.setup import make_train_loader, prepare
from stl_offline.training.steps import StepInputs
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student

STRONG = {"auto_augment": "rand-m9-n2-p1-mstd0.5-inc1", "random_erase": 0.7, "color_jitter": 0.3}


def shown(quick, **changes):
    """{(sample, epoch): what a step learns of it} over a run, and the samples of each epoch."""
    config = StudentConfig(**quick | {"val": None} | STRONG | changes)
    stage = prepare(config, "student")
    source = open_labels(config, stage)
    loader = make_train_loader(stage, source.loader_labels())
    found, samples = {}, []
    for epoch in range(config.epochs):
        batches = list(loader.epoch(epoch, **source.plan(config.shown_together(epoch).start)))
        assert len(batches) == len(loader)
        samples.append([])
        for batch in batches:
            parts = [stage.augment(batch), *source.tokens(batch, None), *source.class_answers(batch)]
            keys = list(zip(batch.sample_ids.tolist(), batch.epochs.tolist(), strict=True))
            assert not found.keys() & set(keys)
            found |= dict(zip(keys, zip(*parts, strict=True), strict=True))
            samples[-1] += [sample for sample, _ in keys]
    source.close()
    return found, samples


@pytest.mark.parametrize("second", [None, {"view_count": 1}])
def test_crops_targets_and_augmentation_are_those_of_the_epochs_without_repeats(quick, make_set, monkeypatch, second):
    """Seven epochs of two crops, of which the last one is left over; three stored views, read from caches of two."""
    monkeypatch.setattr("stl_offline.labels.views_ahead.SPAN_BYTES", 1)
    stored = {"class_top_k": 2, "top_k": 2}
    labels = [make_set(view_count=3, leave_out=2, **stored)[0]]
    settings = {"epochs": 7, "missing": "skip", "class_target": "mix:0.5", "residual": "uniform"}
    if second:
        labels.append(make_set(**stored | second)[0])
        settings["labels_share"] = (2.0, 1.0)
    plain, _ = shown(quick, labels=tuple(labels), **settings)
    ours, samples = shown(quick, labels=tuple(labels), repeats=2, **settings)
    assert ours.keys() == plain.keys() == {(sample, epoch) for sample in range(45) for epoch in range(7)}
    for key, (image, *labels) in ours.items():
        # torch's colour arithmetic rounds by the batch's size.
        torch.testing.assert_close(image, plain[key][0], atol=1e-5, rtol=0)
        assert all(map(torch.equal, labels, plain[key][1:])), key
    assert [len(each) for each in samples] == [46, 44, 46, 44, 46, 44, 45]
    for first, other in ((0, 1), (2, 3), (4, 5)):
        assert sorted(samples[first] + samples[other]) == sorted(2 * list(range(45)))


@pytest.mark.parametrize(("batch_size", "repeats"), [(20, 5), (20, 4), (15, 5), (6, 2)])
def test_mixed_crops_come_from_two_images(quick, batch_size, repeats):
    """Of four, five and three images: only the middle crop of an odd batch is its own partner."""
    stage = prepare(LabelerConfig(**quick | {"batch_size": batch_size, "repeats": repeats, "epochs": 5}), "labeler")
    (first, *_) = make_train_loader(stage, None).epoch(0, **stage.random_plan(0))
    assert len(first) == batch_size
    assert int((first.sample_ids == first.sample_ids.flip(0)).sum()) == batch_size % 2


@given(
    images=st.lists(st.integers(0, 1), min_size=1, max_size=5),
    least=st.integers(1, 40),
    accumulate=st.integers(1, 40),
    crops=st.integers(1, 9),
)
@example(images=[1, 0], least=1, accumulate=8, crops=4)  # 8 and 4 crops
def test_processes_take_as_many_parts_and_none_is_empty(images, least, accumulate, crops):
    sizes = [(least + more) * crops for more in images]
    totals = torch.tensor([sum(sizes), 0.0], dtype=torch.float64)
    (count,) = {count_parts(accumulate, own, totals, len(sizes), crops) for own in sizes}
    assert count == min(accumulate, min(sizes))
    for own in sizes:
        assert len([*StepInputs(torch.zeros(own, 1), torch.zeros(own, 1)).parts(count)]) == count


def test_a_step_is_divided_by_the_crops_of_its_own_epoch(quick, monkeypatch):
    """Five epochs of three steps: four of four crops of an image, and one of single crops."""
    config = LabelerConfig(**quick | {"repeats": 4, "epochs": 5, "val": None})
    found, original = [], optimization.TrainStep._backward

    def backward(self, inputs, totals, crops):
        found.append(crops)
        return original(self, inputs, totals, crops)

    monkeypatch.setattr(optimization.TrainStep, "_backward", backward)
    train_labeler(config)
    assert found == [4] * 12 + [1] * 3


def log_of(run):
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def test_a_run_has_the_epochs_and_steps_of_one_without(quick, make_set, tmp_path):
    config = quick | {"labels": make_set(view_count=3)[0], "epochs": 3, "mixup": 0.8, "val": None} | STRONG
    plain = train_student(StudentConfig(**config))
    out = tmp_path / "ours"
    ours = train_student(StudentConfig(**config | {"repeats": 2, "out": str(out)}))
    assert ours["steps"] == plain["steps"] == 9
    lines = zip(log_of(quick["out"]), log_of(out), strict=True)
    assert all((a["epoch"], a["step"], a["lr"]) == (b["epoch"], b["step"], b["lr"]) for a, b in lines)
    settings = [json.loads((Path(run) / "config.json").read_text())["settings"] for run in (quick["out"], out)]
    # Runs of releases without the setting have no entry of it, and can be resumed.
    assert "repeats" not in settings[0]
    assert settings[1] == settings[0] | {"repeats": 2}
    with pytest.raises(InputError, match="other settings .*repeats"):
        train_student(StudentConfig(**config | {"repeats": 2}))


def test_the_labeler_in_every_step(quick, tmp_path):
    """Stage 1, and a student with online labels."""
    train_labeler(LabelerConfig(**quick | {"repeats": 2, "out": str(tmp_path / "labeler")}))
    online = {"labels": "online", "labeler": str(tmp_path / "labeler"), "loader": "stream"}
    config = StudentConfig(**quick | online | {"repeats": 2, "accumulate": 2, "batch_size": 5} | STRONG)
    summary = train_student(config)
    assert summary["steps"] == 10 and np.isfinite(summary["loss"])
    assert dry_run(replace(config, out=str(tmp_path / "new")), "student").steps == 10


def test_what_does_not_fit(quick, make_set):
    with pytest.raises(InputError, match="`repeats` must divide `batch_size` × `accumulate`, 40; got 3"):
        LabelerConfig(**quick | {"repeats": 3, "epochs": 3, "accumulate": 2})
    with pytest.raises(InputError, match="`repeats` must be at most `epochs`, 2; got 4"):
        LabelerConfig(**quick | {"repeats": 4})
    config = StudentConfig(**quick | {"labels": make_set(view_count=3)[0], "repeats": 4, "epochs": 4})
    for check in (check_labels, lambda config: dry_run(config, "student")):
        with pytest.raises(InputError, match="holds 3 crops of each image, and `repeats` 4 would .*; use at most 3"):
            check(config)
    with pytest.raises(InputError, match="45 images .* 12 batches of up to 4 with 4 crops of an image"):
        dry_run(LabelerConfig(**quick | {"batch_size": 4, "repeats": 4, "epochs": 4}), "labeler")
    for mixing in ("mixup", "cutmix"):
        with pytest.raises(InputError, match="mix different images: .* must be more than `repeats`; got 4 and 4"):
            LabelerConfig(**quick | {"batch_size": 2, "accumulate": 2, "repeats": 4, "epochs": 4, mixing: 0.5})
        LabelerConfig(**quick | {"batch_size": 1, mixing: 0.5})
