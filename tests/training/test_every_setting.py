"""No setting of a training run is silently ignored: each one that shapes the result changes the weights."""

from dataclasses import fields

import pytest
import safetensors.torch
import torch

from stl_offline.config import LabelerConfig, StudentConfig
from stl_offline.settings import RESULT
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student
from tests.source_tree import REPOSITORY

# Something of everything, so that each setting has something to change.
BASE = {
    "val": None,
    "epochs": 2,
    "batch_size": 15,
    "lr": 1e-3,
    "warmup_epochs": 0.0,
    "clip_grad": 2.0,
    "ema_decay": 0.05,
    "drop_path": 0.1,
    "mixup": 0.5,
    "cutmix": 0.5,
    "mix_prob": 0.8,
    "color_jitter": 0.3,
    "random_erase": 0.6,
}
# Each setting's other value; where only a few runs have the setting, what both are made with.
CHANGES = {
    "epochs": (3, {}),
    "batch_size": (20, {}),
    "seed": (4, {}),
    "accumulate": (2, {}),
    "lr": (2e-3, {}),
    "lr_batch": (30, {}),
    "warmup_epochs": (1.0, {}),
    "weight_decay": (0.5, {}),
    "layer_decay": (0.6, {}),
    "clip_grad": (0.1, {}),
    "ema_decay": (0.02, {}),
    "drop_path": (0.4, {}),
    "amp": ("bf16", {}),
    "freeze": (True, {"drop_path": 0.0}),
    "img_size": (40, {}),
    "smoothing": (0.3, {}),
    "mixup": (1.0, {}),
    "cutmix": (1.0, {}),
    "mix_prob": (0.3, {}),
    "mix_mode": ("elem", {}),
    "scale_min": (0.7, {}),
    "flip": (0.0, {}),
    "color_jitter": (0.6, {}),
    "auto_augment": ("rand-m9-mstd0.5-inc1", {}),
    "random_erase": (0.2, {}),
    "erase_mode": ("const", {}),
    "interpolation": ("bicubic", {}),
    "repeats": (2, {"batch_size": 20}),
    "token_weight": (3.0, {}),
}
LABELER = {"token_pool": ("lme", {})}
STUDENT = {
    "token_target": ("argmax", {}),
    "residual": ("ghost", {}),
    "token_norm": ("tokens", {}),
    "soft_classes": (1, {"token_target": "soft"}),
    "sampling_ratio": (1, {}),
    "min_confidence": (0.9, {}),
    "select": ("own", {}),
    "erased_labels": ("keep", {}),
}
# What leaves these weights as they are, and the tests in which it does what it should.
ELSEWHERE = {
    "model": "tests/training/test_any_model.py",
    "token_head": "tests/training/test_any_model.py",
    "class_target": "tests/training/test_class_labels.py",
    "compile": "tests/test_compiled.py",
    "channels_last": "tests/training/test_steps.py",
    "sync_bn": "tests/training/test_parallel.py",
    "skip_broken": "tests/images/test_pack.py",
    "labels_pick": "tests/training/test_label_sources.py",
    "labels_share": "tests/training/test_label_sources.py",
    "crops": "tests/training/test_label_sources.py",
    "match": "tests/labels/test_match.py",
    "missing": "tests/training/test_label_sources.py",
    "allow_changed": "tests/labels/test_join.py",
    "key_prefix": "tests/labels/test_join.py",
}


def shaping(kind):
    return {field.name for field in fields(kind) if field.metadata["affects"] == RESULT}


def test_every_setting_is_here():
    assert all((REPOSITORY / place).is_file() for place in ELSEWHERE.values())
    assert shaping(LabelerConfig) <= CHANGES.keys() | LABELER.keys() | ELSEWHERE.keys()
    assert shaping(StudentConfig) == CHANGES.keys() | STUDENT.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def make_weights(stripes, make_set, tmp_path_factory):
    """make_weights(stage, **settings) → the weights that a run ends with; the same settings are run once."""
    place, _ = make_set(top_k=2)
    known = {}

    def make(stage, **settings):
        name = (stage, *sorted(settings.items()))
        if name not in known:
            out = tmp_path_factory.mktemp("run") / "run"
            machine = {"data": str(stripes[0]), "out": str(out), "device": "cpu", "workers": 1}
            given = machine | {"img_size": 32, "seed": 3, "amp": "none"} | BASE | settings
            if stage == "student":
                train_student(StudentConfig(labels=place, **given))
            else:
                train_labeler(LabelerConfig(**given))
            known[name] = safetensors.torch.load_file(out / "weights.safetensors")
        return known[name]

    return make


def differ(first, second):
    same = first.keys() == second.keys() and all(first[name].shape == second[name].shape for name in first)
    return not same or any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", [*CHANGES, *STUDENT])
def test_a_student_changes_with_each_setting(make_weights, name):
    value, more = (CHANGES | STUDENT)[name]
    assert differ(make_weights("student", **more), make_weights("student", **more | {name: value}))


@pytest.mark.parametrize("name", ["smoothing", "mixup", "cutmix", "mix_mode", "color_jitter", "token_weight", *LABELER])
def test_a_labeler_changes_with_each_setting(make_weights, name):
    value, more = (CHANGES | LABELER)[name]
    assert differ(make_weights("labeler", **more), make_weights("labeler", **more | {name: value}))


def test_the_same_settings_give_the_same_weights(make_weights):
    assert not differ(make_weights("student"), make_weights("student", log_every=7))
