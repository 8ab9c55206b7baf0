"""timm's train.py with token labels: the documented diff, on the script where one is given, and on the calls it makes.

timm's wheel has no train.py. STL_OFFLINE_TIMM_TRAIN names one, of timm's repository at the installed version.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data import create_dataset, create_loader
from timm.task import ClassificationTask

from stl_offline.augment import MixSettings
from stl_offline.errors import InputError
from stl_offline.loops import TimmTokenDataset
from stl_offline.losses import soft_cross_entropy, token_cross_entropy
from stl_offline.models import TokenModel
from tests.source_tree import REPOSITORY

# timm's dataset leaves the files that it reads open.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SIDE = 64


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TokenModel(timm.create_model("test_resnet", num_classes=3), img_size=SIDE)


def make_loader(images, labels, model, prefetcher=True, workers=0, options=None, **settings):
    """As train.py makes them: the dataset is wrapped, and its collate function goes to the loader."""
    dataset = create_dataset("", root=str(images), is_training=True)
    dataset = TimmTokenDataset(dataset, labels, model, img_size=SIDE, **settings)
    loader = create_loader(
        dataset,
        (3, SIDE, SIDE),
        batch_size=4,
        is_training=True,
        scale=(0.3, 1.0),
        num_workers=workers,
        collate_fn=dataset.collate,
        device=torch.device("cpu"),
        use_prefetcher=prefetcher,
        persistent_workers=workers > 0,
        **{"color_jitter": None, "interpolation": "bicubic"} | (options or {}),
    )
    return dataset, loader


@pytest.mark.parametrize(("prefetcher", "workers"), [(True, 0), (False, 0), (True, 2)])
def test_a_step_of_timms_task(prefetcher, workers, images, whole, model):
    dataset, loader = make_loader(images, whole, model, prefetcher, workers, smoothing=0.1, kind="soft", seed=5)
    assert dataset.crop.settings.scale == (0.3, 1.0) and dataset.crop.interpolation == "bicubic"
    task = ClassificationTask(model, criterion=dataset.loss(loader, weight=0.5), device=torch.device("cpu"))
    dataset.set_epoch(2)
    seen = 0
    for pixels, target in loader:
        assert pixels.shape[1:] == (3, SIDE, SIDE) and abs(float(pixels.mean())) < 3
        assert target.shape == (len(pixels), 3 + 2 * 4 * 5)
        seen += len(pixels)
    assert seen == 12  # timm drops the last, smaller batch
    result = task(pixels, target)
    class_logits, token_logits = model(pixels)
    ids, weights = (part.reshape(len(pixels), 4, 5) for part in target[:, 3:].split(20, dim=1))
    expected = soft_cross_entropy(class_logits, target[:, :3])
    expected = expected + 0.5 * token_cross_entropy(token_logits, ids.long(), weights)
    torch.testing.assert_close(result["loss"], expected, rtol=0.2, atol=0)  # batch norm moved in between
    result["loss"].backward()
    assert model.token_head[1].weight.grad.abs().sum() > 0


def test_the_sampler_of_several_processes_is_told_of_epochs(images, whole, model, monkeypatch):
    """timm's script calls the dataset's `set_epoch` in place of the sampler's."""
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", 0)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    dataset, loader = make_loader(images, whole, model, options={"distributed": True})
    dataset.loss(loader)
    orders = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        orders.append(list(loader.sampler))
    assert len(orders[0]) == 8 and orders[0] != orders[1] and dataset.epoch == 1


def test_targets_are_those_of_the_labels(images, whole, model):
    dataset, _ = make_loader(images, whole, model, kind="soft", seed=5)
    dataset.set_epoch(3)
    items = [dataset[2], dataset[13]]
    pixels, target = dataset.collate(items)
    assert pixels.dtype == torch.uint8
    ids, weights = dataset.labels(dataset.rows[[2, 13]], np.stack([item.view for item in items]), 3, seed=5)
    np.testing.assert_array_equal(target[:, 3:23].numpy(), ids.reshape(2, -1))
    np.testing.assert_array_equal(target[:, 23:].numpy(), weights.reshape(2, -1))
    assert target[:, :3].argmax(dim=1).tolist() == [item.class_id for item in items]


def test_mixing_is_of_pixels_and_targets(images, whole, model):
    dataset, _ = make_loader(images, whole, model, mix=MixSettings(cutmix=1.0), kind="soft")
    items = [dataset[place] for place in (0, 6, 14)]
    pixels, target = dataset.collate(items)
    assert pixels.dtype == torch.uint8
    assert target.shape == (3, 3 + 2 * 4 * 10)
    again = dataset.collate(items)
    assert torch.equal(pixels, again[0]) and torch.equal(target, again[1])
    torch.testing.assert_close(target[:, :3].sum(dim=1), torch.ones(3))


def test_what_moves_pixels_is_refused(images, whole, model):
    for options, reason in (
        ({"auto_augment": "rand-m9-mstd0.5"}, "RandAugment moves or hides pixels"),
        ({"vflip": 0.5}, "RandomVerticalFlip moves"),
        ({"interpolation": "random"}, "needs? one interpolation"),
        ({"train_crop_mode": "rkrc"}, "moves or hides pixels|no RandomResizedCrop"),
    ):
        with pytest.raises(InputError, match=reason):
            make_loader(images, whole, model, options=options)
    dataset, loader = make_loader(images, whole, model, options={"re_prob": 0.5})
    with pytest.raises(InputError, match="erases boxes .*--reprob 0"):
        dataset.loss(loader)
    dataset, loader = make_loader(images, whole, model, prefetcher=False)
    loader.collate_fn = None
    with pytest.raises(InputError, match="the dataset's collate method"):
        dataset.loss(loader)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"mixup": 0.8}, "--mixup 0.8 of timm's script .*MixSettings"),
        ({"cutmix": 1.0}, "--cutmix 1.0 of .*MixSettings"),
        ({"cutmix_minmax": [0.2, 0.8]}, r"--cutmix-minmax \[0.2, 0.8\] of .*MixSettings"),
        ({"mixup_off_epoch": 5}, "--mixup-off-epoch 5 of .*mixes in every epoch"),
        ({"aug_repeats": 3}, "--aug-repeats 3 of .*repeats would be the same"),
        ({"bce_loss": True}, "--bce-loss of .*cross-entropy"),
        ({"jsd_loss": True}, "--jsd-loss of .*cross-entropy"),
    ],
)
def test_options_without_effect_are_refused(given, reason, images, whole, model):
    """The collate function and the loss that these options choose are replaced."""
    dataset, loader = make_loader(images, whole, model)
    off = {"mixup": 0.0, "cutmix": 0.0, "cutmix_minmax": None, "bce_loss": False, "jsd_loss": False}
    off |= {"mixup_off_epoch": 0, "aug_repeats": 0}
    dataset.loss(loader, argparse.Namespace(**off))
    with pytest.raises(InputError, match=reason):
        dataset.loss(loader, argparse.Namespace(**off | given))


def documented_diff() -> list[tuple[str, str]]:
    """(line of the script or "", line instead) of the diff in the documentation."""
    page = (REPOSITORY / "docs" / "your-loop.md").read_text()
    body = re.search(r"```text\n(--- train\.py.*?)```", page, re.DOTALL)[1]
    return [(line[0], line[1:]) for line in body.splitlines() if line[:1] in "+- " and line[:3] not in ("---", "+++")]


def apply(script: str) -> str:
    """The script with the documented diff; context lines are found one after the other."""
    lines, at, out = script.splitlines(), 0, []
    for sign, text in documented_diff():
        if sign == "+":
            out.append(text)
            continue
        found = lines.index(text, at)
        out += lines[at:found] + ([text] if sign == " " else [])
        at = found + 1
    return "\n".join([*out, *lines[at:]]) + "\n"


def test_the_diff_is_short():
    assert 0 < sum(sign in "+-" for sign, _ in documented_diff()) <= 10


@pytest.mark.skipif("STL_OFFLINE_TIMM_TRAIN" not in os.environ, reason="STL_OFFLINE_TIMM_TRAIN names no train.py")
def test_the_script_trains(images, whole, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(apply(Path(os.environ["STL_OFFLINE_TIMM_TRAIN"]).read_text()))
    # The diff names the label set as users do: in the working directory.
    (tmp_path / "labels").symlink_to(whole.place)
    arguments = ["--data-dir", images, "--train-split", ".", "--val-split", ".", "--model", "test_resnet"]
    arguments += ["--num-classes", 3, "--img-size", SIDE, "-b", 4, "--epochs", 1, "--warmup-epochs", 0, "--workers", 1]
    arguments += [
        "--color-jitter",
        0,
        "--train-interpolation",
        "bicubic",
        "--device",
        "cpu",
        "--output",
        tmp_path / "out",
        "--lr",
        0.01,
    ]
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "out").rglob("summary.csv"))
