"""Settings are declared once: what a field affects, which values it takes, and what is recorded under which name."""

import dataclasses

import pytest

from stl_offline import config as module
from stl_offline.augment import MixSettings, RandomErase
from stl_offline.config import Config, DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig, result_settings
from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings
from stl_offline.settings import INPUT, JOB, RESULT
from stl_offline.targets import TokenTargets

PLACES = {"data": "images", "out": "run"}
KINDS = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Config)]


def fields_of(kind, *affects):
    return {field.name for field in dataclasses.fields(kind) if field.metadata["affects"] in affects}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_is_declared_with_a_help_text(kind):
    for field in dataclasses.fields(kind):
        assert field.metadata["affects"] in (RESULT, INPUT, JOB), field.name
        assert field.metadata["help"].endswith("."), field.name


def test_what_does_not_shape_a_run():
    free = {"device", "workers", "out", "resume", "val_every", "checkpoint_every", "checkpoint_steps", "log_every"}
    assert fields_of(StudentConfig, JOB) == free | {"tensorboard", "grad_checkpointing"}
    assert fields_of(StudentConfig, INPUT) >= {"data", "val", "labels", "labeler", "labeler_checkpoint"}
    # These have entries of their own in the manifest.
    named = {"draws", "confidence", "class_top_k", "class_draws", "first_view"}
    assert fields_of(DumpConfig, JOB) == {"device", "workers", "out", "shards"} | named


def test_recorded_names_are_those_of_earlier_releases():
    student = result_settings(StudentConfig(**PLACES, crops="random", soft_classes=3))
    assert (student["views"], student["columns"]) == ("random", 3)
    assert not {"crops", "soft_classes", "data", "labels", "device"} & student.keys()
    dump = result_settings(DumpConfig(**PLACES, labeler="run", crops_per_image=4))
    assert dump["views"] == 4
    assert not {"crops_per_image", "shards", "labeler", "out"} & dump.keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"img_size": 0}, r"`img_size` must be in \[1, 8192\], got 0"),
        ({"epochs": 0}, "`epochs` must be at least 1, got 0"),
        ({"lr": 0.0}, "`lr` must be greater than 0, got 0.0"),
        ({"ema_decay": 1.0}, r"`ema_decay` must be in \[0, 1\), got 1.0"),
        ({"clip_grad": float("inf")}, "`clip_grad` must be a finite number, got inf"),
        ({"seed": 1 << 63}, r"`seed` must be in \[0, 9223372036854775808\)"),
        ({"seed": -1}, "`seed` must be in"),
        ({"color_jitter": -1.0}, "`color_jitter` must be at least 0, got -1.0"),
        ({"amp": "half"}, "`amp` must be one of auto, none, bf16, fp16; got 'half'"),
        ({"color_jitter": float("nan")}, "`color_jitter` must be a finite number, got nan"),
    ],
)
def test_a_value_out_of_bounds(settings, message):
    with pytest.raises(InputError, match=message):
        LabelerConfig(**PLACES, **settings)


@pytest.mark.parametrize(
    ("settings", "build"),
    [
        ({"flip": 2.0}, lambda: CropSettings(scale=(0.25, 1.0), flip=2.0)),
        ({"scale_min": 0.0}, lambda: CropSettings(scale=(0.0, 1.0))),
        ({"mixup": -1.0}, lambda: MixSettings(mixup=-1.0)),
        ({"mix_prob": 1.5}, lambda: MixSettings(prob=1.5)),
        ({"mix_mode": "all"}, lambda: MixSettings(mode="all")),
        ({"random_erase": 1.1}, lambda: RandomErase(1.1)),
        ({"erase_mode": "grey"}, lambda: RandomErase(0.0, "grey")),
        ({"token_target": "hard"}, lambda: TokenTargets("hard", (2, 2))),
        ({"residual": "drop"}, lambda: TokenTargets("soft", (2, 2), residual="drop")),
        ({"soft_classes": 0}, lambda: TokenTargets("soft", (2, 2), m=0)),
        ({"sampling_ratio": 0}, lambda: TokenTargets("soft", (2, 2), sampling_ratio=0)),
        ({"min_confidence": 1.5}, lambda: TokenTargets("soft", (2, 2), min_confidence=1.5)),
    ],
)
def test_a_setting_is_checked_by_its_owner(settings, build):
    """The command's settings and the class that they are for refuse a value with the same words."""
    with pytest.raises(InputError) as theirs:
        build()
    with pytest.raises(InputError) as ours:
        StudentConfig(**PLACES, **settings)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "online"}, '`labels="online"` needs `labeler`'),
        ({"labeler": "run"}, '`labeler` needs `labels="online"`'),
        ({"labels": ("a", "none")}, "several `labels` must all be label sets"),
        ({"labels": ()}, "`labels` must be at least one"),
        ({"labels": ("a", "b"), "labels_share": (1.0,)}, "`labels_share` must be 2 positive numbers"),
        ({"key_prefix": "train/"}, "`key_prefix` must be OLD=NEW"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(InputError, match=message):
        StudentConfig(**PLACES, **settings)


def test_a_central_crop_takes_something():
    with pytest.raises(InputError, match=r"`crop_pct` must be in \(0, 1\], got 0.0"):
        EvaluateConfig(data="images", checkpoint="run", crop_pct=0.0)
