"""No setting of fine-tuning is silently ignored: each one that shapes the result changes the weights."""

from dataclasses import fields

import pytest
import safetensors.torch
import torch

from stl_offline.config_transfer import DetectConfig, SegmentConfig
from stl_offline.settings import RESULT
from stl_offline.transfer import train_detector, train_segmenter
from tests.source_tree import REPOSITORY
from tests.transfer.conftest import CLASSES, IGNORE
from tests.transfer.test_detect import boxed  # noqa: F401

BASE = {
    "device": "cpu",
    "workers": 1,
    "amp": "none",
    "backbone": "timm:fan_micro_4_p8",
    "epochs": 2,
    "batch_size": 2,
    "lr": 1e-3,
    "warmup_epochs": 0.0,
    "ema_decay": 0.05,
    "clip_grad": 5.0,
    "head_width": 16,
}
SEGMENT = {"crop_height": 32, "crop_width": 48, "ignore_id": IGNORE}
DETECT = {"side": 64, "longest": 96}
# Each setting's other value; where only a few runs have the setting, what both are made with.
CHANGES = {
    "schedule": ("cosine", {}),
    "epochs": (3, {}),
    "batch_size": (3, {}),
    "seed": (4, {}),
    "accumulate": (2, {}),
    "lr": (2e-3, {}),
    "lr_batch": (8, {}),
    "warmup_epochs": (1.0, {"epochs": 4}),
    "weight_decay": (0.5, {}),
    "layer_decay": (0.6, {}),
    "clip_grad": (0.1, {}),
    "ema_decay": (0.02, {}),
    "drop_path": (0.4, {}),
    "amp": ("bf16", {}),
    "freeze": (True, {}),
    "head_lr_scale": (3.0, {}),
    "flip": (0.0, {}),
    "head_width": (8, {}),
}
OF_SEGMENT = {
    "crop_height": (24, {}),
    "crop_width": (40, {}),
    "scale_min": (0.9, {}),
    "scale_max": (1.1, {}),
    "color_jitter": (0.0, {}),
    "head_dropout": (0.5, {}),
}
OF_DETECT = {"side": (96, {"longest": 144}), "side_min": (64, {"side": 96, "longest": 144}), "longest": (64, {})}
# What leaves these weights as they are, and the tests in which it does what it should.
ELSEWHERE = {
    "compile": "tests/test_compiled.py",
    "ignore_id": "tests/transfer/test_pairs.py",
    "channels_last": "tests/training/test_steps.py",
    "sync_bn": "tests/transfer/test_segment.py",
    "sliding_window": "tests/transfer/test_segment.py",
    "masks": "tests/transfer/test_object_masks.py",
}


def test_every_setting_is_here():
    found = {
        field.name
        for kind in (SegmentConfig, DetectConfig)
        for field in fields(kind)
        if field.metadata["affects"] == RESULT
    }
    assert found == CHANGES.keys() | OF_SEGMENT.keys() | OF_DETECT.keys() | ELSEWHERE.keys()
    assert all((REPOSITORY / place).is_file() for place in ELSEWHERE.values())


@pytest.fixture(scope="module")
def make_weights(scenes, boxed, tmp_path_factory):  # noqa: F811
    """make_weights(task, **settings) → the weights that a run ends with; the same settings are run once."""
    known = {}

    def make(task, **settings):
        name = (task, *sorted(settings.items()))
        if name not in known:
            out = tmp_path_factory.mktemp("run") / "run"
            given = {"out": str(out), "classes": ",".join(CLASSES)} | BASE
            if task == "segment":
                # The ids of the border, and of what is no class, are 9.
                train_segmenter(SegmentConfig(**given | SEGMENT | {"data": str(scenes[0])} | settings))
            else:
                given |= DETECT | {"data": str(boxed[0]), "split": "train", "classes": ",".join(CLASSES)}
                train_detector(DetectConfig(**given | settings))
            known[name] = safetensors.torch.load_file(out / "weights.safetensors")
        return known[name]

    return make


def differ(first, second):
    same = first.keys() == second.keys() and all(first[name].shape == second[name].shape for name in first)
    return not same or any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [*CHANGES, *OF_SEGMENT])
def test_a_segmenter_changes_with_each_setting(make_weights, name):
    value, more = (CHANGES | OF_SEGMENT)[name]
    assert differ(make_weights("segment", **more), make_weights("segment", **more | {name: value}))


@pytest.mark.parametrize("name", [*CHANGES, *OF_DETECT])
def test_a_detector_changes_with_each_setting(make_weights, name):
    value, more = (CHANGES | OF_DETECT)[name]
    assert differ(make_weights("detect", **more), make_weights("detect", **more | {name: value}))


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_the_same_settings_give_the_same_weights(make_weights, task):
    assert not differ(make_weights(task), make_weights(task, log_every=7))
