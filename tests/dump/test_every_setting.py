"""No setting of a dump is silently ignored: what shapes the labels changes the shards, not only the manifest."""

import json
from dataclasses import fields

import numpy as np
import pytest

from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels
from stl_offline.labels.label_set import open_label_set

BASE = {"crops_per_image": 2, "shards": 1, "batch_size": 16, "encoding": "f16"}
# Each setting's other value, and what both dumps are made with.
CHANGES = {
    "top_k": (1, {}),
    "draws": (2, {"top_k": None}),
    "confidence": (True, {"top_k": None, "draws": 2}),
    "class_top_k": (1, {}),
    "class_draws": (1, {}),
    "first_view": (1, {}),
    "crops_per_image": (3, {}),
    "img_size": (40, {}),
    "seed": (4, {}),
    "scale_min": (0.8, {}),
    "flip": (1.0, {}),
    "interpolation": ("bicubic", {}),
    "format": ("webdataset", {}),
    "encoding": ("q8", {}),
    "amp": ("bf16", {}),
}
# What leaves these labels as they are, and why.
ELSEWHERE = {
    "device": "the same labels, but for rounding",
    "workers": "the same labels",
    "out": "where they lie",
    "shards": "how they are divided",
    "batch_size": "the same labels, but for rounding",
    "labeler_by_order": "needs a checkpoint of a timm labeler",
    "labeler_mean": "needs a timm labeler",
    "labeler_std": "needs a timm labeler",
    "licence": "stands in the manifest",
    "skip_broken": "needs broken images",
}


def test_every_setting_is_here():
    inputs = {field.name for field in fields(DumpConfig) if field.metadata["affects"] == "input"}
    assert {field.name for field in fields(DumpConfig)} - inputs == CHANGES.keys() | ELSEWHERE.keys()


@pytest.fixture(scope="module")
def shards_of(work, tmp_path_factory):
    """shards_of(**settings) → a label set of one shard; the same settings are dumped once."""
    known = {}

    def make(**settings):
        name = json.dumps(settings, sort_keys=True)
        if name not in known:
            out = tmp_path_factory.mktemp("dump") / "set"
            dump_labels(DumpConfig(**work | BASE | settings | {"out": str(out)}))
            known[name] = open_label_set(out)
        return known[name]

    return make


@pytest.mark.parametrize("name", CHANGES)
def test_labels_change_with_each_setting(shards_of, name):
    value, more = CHANGES[name]
    before, after = shards_of(**more), shards_of(**more | {name: value})
    assert before.shards[0].sha256 != after.shards[0].sha256


def views_of(label_set):
    return np.array([label_map.views for label_map in label_set.values()])


def test_views_are_those_that_the_settings_ask_for(shards_of):
    base = views_of(shards_of())
    assert not np.array_equal(base, views_of(shards_of(seed=4)))
    large = views_of(shards_of(scale_min=0.8))
    areas = [np.abs(views[..., 0] * views[..., 4]) for views in (base, large)]
    assert areas[1].min() > 0.75 and areas[0].min() < 0.75
    assert (views_of(shards_of(flip=1.0))[..., 0] < 0).all() and (views_of(shards_of(flip=0.0))[..., 0] > 0).all()
    assert np.array_equal(base[:, 1], views_of(shards_of(first_view=1))[:, 0])
