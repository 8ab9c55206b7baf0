"""Settings are declared once: what a field affects, which values it takes, and what is recorded under which name."""

import dataclasses

import pytest

from stl_offline import config as module
from stl_offline.augment import MixSettings, RandomErase
from stl_offline.cli.main import main
from stl_offline.config import (
    Config,
    DumpConfig,
    EvaluateConfig,
    LabelerConfig,
    PreviewConfig,
    ReportConfig,
    StudentConfig,
    result_settings,
)
from stl_offline.config_transfer import SegmentConfig, TransferEvaluateConfig
from stl_offline.errors import InputError
from stl_offline.geometry import CropSettings
from stl_offline.labels.spec import CONTAINERS, ENCODINGS
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


def test_forms_of_label_sets_are_those_that_can_be_written():
    """Settings import nothing heavy, so they list them themselves."""
    found = {
        field.name: field.metadata["choices"]
        for field in dataclasses.fields(DumpConfig)
        if field.name in ("format", "encoding")
    }
    assert found == {"format": tuple(CONTAINERS), "encoding": tuple(ENCODINGS)}


def test_what_does_not_shape_a_run():
    free = {"device", "workers", "out", "resume", "val_every", "checkpoint_every", "checkpoint_steps", "log_every"}
    assert fields_of(StudentConfig, JOB) == free | {"tensorboard", "grad_checkpointing", "loader"}
    assert fields_of(StudentConfig, INPUT) >= {"data", "val", "labels", "labeler", "labeler_checkpoint"}
    # These have entries of their own in the manifest.
    named = {"draws", "confidence", "class_top_k", "class_draws", "first_view"}
    assert fields_of(DumpConfig, JOB) == {"device", "workers", "out", "shards"} | named


def test_recorded_names_are_those_of_earlier_releases():
    student = result_settings(
        StudentConfig(**PLACES, labels="set", crops="random", token_target="soft", soft_classes=3)
    )
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


PREVIEW, REPORT = {"path": "labels"}, {"runs": ("run",)}
DUMP = {**PLACES, "labeler": "run"}
SEGMENT = {**PLACES, "backbone": "run", "classes": "road,sky"}
SET, ONLINE = {"labels": "set"}, {"labels": "online", "labeler": "run"}

# Settings class, what it cannot do without, a setting with a value, and settings beside which it does something and
# beside which it does nothing.
NEEDS = [
    (LabelerConfig, PLACES, {"token_pool": "lme"}, [{"token_weight": 0.1}], [{"token_weight": 0.0}]),
    (LabelerConfig, PLACES, {"val_every": 2}, [{"val": "v"}], [{}]),
    (LabelerConfig, PLACES, {"mix_prob": 0.5}, [{"mixup": 0.8}, {"cutmix": 1.0}], [{}, {"mixup": 0.0}]),
    (LabelerConfig, PLACES, {"mix_mode": "elem"}, [{"mixup": 0.8}, {"cutmix": 1.0}], [{}]),
    (LabelerConfig, PLACES, {"erase_mode": "const"}, [{"random_erase": 0.1}], [{}]),
    (StudentConfig, PLACES, {"token_weight": 0.5}, [SET, ONLINE], [{}]),
    (StudentConfig, PLACES, {"labels_pick": "draw"}, [{"labels": ("a", "b")}], [{}, SET, ONLINE]),
    (StudentConfig, PLACES, {"labeler": "run"}, [{"labels": "online"}], [{}, SET, {"labels": ("a", "b")}]),
    (StudentConfig, PLACES, {"labeler_checkpoint": "file"}, [ONLINE], [{}, SET]),
    (StudentConfig, PLACES, {"labeler_pretrained": True}, [ONLINE], [{}, SET]),
    (StudentConfig, PLACES, {"labeler_classes": "file"}, [ONLINE], [{}, SET]),
    (StudentConfig, PLACES, {"token_target": "argmax"}, [SET, ONLINE], [{}]),
    (
        StudentConfig,
        PLACES,
        {"residual": "uniform"},
        [SET, {**ONLINE, "token_target": "soft"}],
        [{}, ONLINE, {**SET, "token_target": "argmax"}],
    ),
    (StudentConfig, PLACES, {"crops": "random"}, [SET], [{}, ONLINE]),
    (
        StudentConfig,
        PLACES,
        {"soft_classes": 3},
        [{**each, "token_target": "soft"} for each in (SET, ONLINE)],
        [{}, SET],
    ),
    (
        StudentConfig,
        PLACES,
        {"sampling_ratio": 3},
        [SET, {**ONLINE, "auto_augment": "rand-m9"}],
        [{}, {"auto_augment": "rand-m9"}, ONLINE],
    ),
    (StudentConfig, PLACES, {"min_confidence": 0.5}, [SET, ONLINE], [{}]),
    (StudentConfig, PLACES, {"select": "own"}, [SET, ONLINE], [{}]),
    (StudentConfig, PLACES, {"select": "confident:0.5"}, [SET, ONLINE], [{}]),
    (
        StudentConfig,
        PLACES,
        {"erased_labels": "keep"},
        [{**SET, "random_erase": 0.2}],
        [{}, SET, {"random_erase": 0.2}],
    ),
    (StudentConfig, PLACES, {"match": "stem"}, [SET], [{}, ONLINE]),
    (StudentConfig, PLACES, {"missing": "skip"}, [SET], [{}, ONLINE]),
    (StudentConfig, PLACES, {"allow_changed": True}, [SET], [{}, ONLINE]),
    (StudentConfig, PLACES, {"key_prefix": "a/=b/"}, [SET], [{}, ONLINE]),
    (DumpConfig, DUMP, {"seed": 1}, [{"crops_per_image": 2}, {"draws": 4}, {"class_draws": 4}], [{}]),
    (DumpConfig, DUMP, {"scale_min": 0.5}, [{"crops_per_image": 1}], [{}, {"draws": 4}]),
    (DumpConfig, DUMP, {"flip": 0.0}, [{"crops_per_image": 1}], [{}, {"draws": 4}]),
    (PreviewConfig, PREVIEW, {"samples": 3}, [{}, {"keys": ("a/*", "b")}], [{"suspects": 3}, {"keys": ("a",)}]),
    (PreviewConfig, PREVIEW, {"seed": 3}, [{}, {"keys": ("a/?",)}], [{"suspects": 3}, {"keys": ("a", "b")}]),
    (PreviewConfig, PREVIEW, {"missing": "skip"}, [{"data": "images"}], [{}]),
    (PreviewConfig, PREVIEW, {"match": "stem"}, [{"data": "images"}], [{}]),
    (PreviewConfig, PREVIEW, {"allow_changed": True}, [{"data": "images"}], [{}]),
    *(
        (ReportConfig, REPORT, setting, [{"data": "images"}], [{}])
        for setting in ({"examples": 2}, {"predict": 9}, {"skip_broken": True}, {"seed": 1})
    ),
    (
        TransferEvaluateConfig,
        {"data": "images", "checkpoint": "run"},
        {"seed": 1},
        [{"corrupt": "fog"}],
        [{}],
    ),
    (SegmentConfig, SEGMENT, {"val_split": "val"}, [{"val": "images"}], [{}]),
    (SegmentConfig, SEGMENT, {"val_every": 2}, [{"val": "images"}], [{}]),
    (SegmentConfig, SEGMENT, {"sliding_window": True}, [{"val": "images"}], [{}]),
    (SegmentConfig, SEGMENT, {"drop_path": 0.3}, [{}], [{"freeze": True}]),
    (LabelerConfig, PLACES, {"layer_decay": 0.8}, [{}], [{"freeze": True}]),
    (StudentConfig, PLACES, {"token_norm": "tokens"}, [{"labels": "a"}], [{}, {"labels": "a", "token_weight": 0}]),
    *(
        (StudentConfig, PLACES, setting, [{"labels": "a"}], [{"labels": "a", "token_weight": 0}])
        for setting in (
            {"token_target": "argmax"},
            {"residual": "class"},
            {"sampling_ratio": 3},
            {"min_confidence": 0.2},
            {"select": "own"},
        )
    ),
    (SegmentConfig, SEGMENT, {"layer_decay": 0.8}, [{}], [{"freeze": True}]),
]


@pytest.mark.parametrize(("kind", "base", "setting", "used", "idle"), NEEDS, ids=lambda value: str(value)[:40])
def test_a_setting_is_used_or_refused(kind, base, setting, used, idle):
    for more in used:
        kind(**{**base, **setting, **more})
    for more in idle:
        with pytest.raises(InputError, match=f"`{next(iter(setting))}` needs .*, else it does nothing; leave it out"):
            kind(**{**base, **setting, **more})


def test_every_need_is_tried():
    """Those declared, but for one that is refused for its own reasons first; the default is never refused."""
    tried = {(kind, name) for kind, _, setting, _, _ in NEEDS for name in setting} | {(StudentConfig, "labels_share")}
    bases = {LabelerConfig: PLACES, StudentConfig: PLACES, DumpConfig: DUMP, SegmentConfig: SEGMENT}
    for kind, base in (bases | {PreviewConfig: PREVIEW, ReportConfig: REPORT}).items():
        kind(**base)
        declared = {field.name for field in dataclasses.fields(kind) if field.metadata["needs"]}
        shared = {field.name for field in dataclasses.fields(LabelerConfig)} - {"token_pool"}
        declared -= shared if kind is StudentConfig else set()
        assert declared <= {name for owner, name in tried if owner is kind}, kind


def test_what_does_nothing_is_named_together():
    with pytest.raises(InputError) as error:
        StudentConfig(**PLACES, match="stem", missing="skip", mix_mode="elem")
    assert str(error.value) == (
        "`mix_mode` needs `mixup` or `cutmix` above 0 and `match` and `missing` need a label set in `labels`, "
        "else they do nothing; leave them out"
    )


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("train-student --data x --out y --labels none --match stem", ["--match", "--labels"]),
        ("train-student --data x --out y --views random", ["--views", "--labels"]),
        ("train-student --data x --out y --labels set --labeler run", ["--labeler", "--labels online"]),
        ("train-student --data x --out y --labels set --columns 3", ["--columns", "--token-target soft"]),
        ("train-labeler --data x --out y --mix-prob 0.5", ["--mix-prob", "--mixup", "--cutmix"]),
        ("train-labeler --data x --out y --val-every 5", ["--val-every", "--val"]),
        ("dump-labels --data x --labeler y --out z --scale-min 0.5", ["--scale-min", "--views"]),
        ("dump-labels --data x --labeler y --out z --seed 3", ["--seed", "--views", "--draws", "--class-draws"]),
        ("labels preview set --match stem", ["--match", "--data"]),
        ("labels preview set --suspects 2 --samples 3", ["--samples", "--suspects", "--key"]),
        ("report run --predict 10", ["--predict", "--data"]),
        (
            "transfer segment --data x --classes a --backbone y --out z --freeze --drop-path 0.2",
            ["--drop-path", "--freeze"],
        ),
    ],
)
def test_the_command_line_refuses_in_its_own_words(line, named, capsys):
    assert main(line.split()) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.endswith("else it does nothing; leave it out")
    assert "`" not in error
    assert all(option in error for option in named)


def test_a_central_crop_takes_something():
    with pytest.raises(InputError, match=r"`crop_pct` must be in \(0, 1\], got 0.0"):
        EvaluateConfig(data="images", checkpoint="run", crop_pct=0.0)
