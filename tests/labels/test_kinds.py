"""Every command on label sets takes every kind of labels."""

import json
from dataclasses import fields, replace

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.geometry import CropSettings
from stl_offline.labels.arrays import LabelMap, select
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS
from stl_offline.labels.stats import measure
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.reports.panels import scene_panels
from stl_offline.reports.scene import StudentSettings, make_scenes
from tests.labels.format.test_version2 import KINDS
from tests.labels.synthetic import make_arrays, make_spec, write_set


def run(capsys, *arguments) -> str:
    assert main(["labels", *map(str, arguments)]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


@pytest.mark.parametrize("name", ["one draw of crops", "hybrid", "all"])
def test_commands_take_all_kinds(name, tmp_path, capsys):
    spec = make_spec(encoding="q8", **KINDS[name])
    write_set(tmp_path / "a", spec, 2)
    words = run(capsys, "inspect", tmp_path / "a")
    if spec.draws:
        assert f"{spec.draws} draw" in words and ("top" in words) == (spec.top_k > 0)
    run(capsys, "verify", tmp_path / "a")
    stats = json.loads(run(capsys, "stats", tmp_path / "a", "--json"))
    assert (stats["draws"], stats["top_k"]) == (spec.draws, spec.top_k)
    if spec.draws:
        assert stats["residual"] == pytest.approx(0, abs=1e-5)
    assert "tokens:" in run(capsys, "stats", tmp_path / "a")
    run(capsys, "stats", tmp_path / "a", "--suspects", 3, *(["--worth"] if spec.views_per_image > 1 else []))
    for container in CONTAINERS:
        run(capsys, "convert", tmp_path / "a", tmp_path / container, "--format", container, "--shards", 3)
        assert spec.format_version == open_label_set(tmp_path / container).spec.format_version
    run(capsys, "push", tmp_path / "webdataset", tmp_path / "store")
    run(capsys, "pull", tmp_path / "store", tmp_path / "part", "--shards", "1")
    run(capsys, "verify", tmp_path / "part")
    card = (tmp_path / "webdataset" / "README.md").read_text()
    assert "labels.npz" in card
    run(capsys, "preview", tmp_path / "a", "--samples", 2, "--out", tmp_path / "page")


@pytest.mark.parametrize("name", ["draws", "one draw of crops", "draws and confidence", "hybrid", "all"])
def test_stats_and_previews_show_draws_as_frequencies(name, tmp_path):
    """What is counted and shown of a token is the distribution that the labels stand for."""
    spec = make_spec(**KINDS[name])
    write_set(tmp_path / "a", spec, 2)
    label_set = open_label_set(tmp_path / "a")
    maps = list(label_set.values())
    dense = np.concatenate([each.dense().reshape(-1, spec.num_classes) for each in maps])
    stats = measure(label_set)
    ranked = -np.sort(-dense, axis=1)[:, : spec.top_k + spec.draws].mean(0)
    np.testing.assert_allclose(
        np.pad(ranked, (0, len(stats.mass_by_rank) - len(ranked))), stats.mass_by_rank, atol=1e-4
    )
    assert stats.confidence == pytest.approx(dense.max(1).mean(), abs=1e-4)
    assert stats.classes_stored == (dense > 0).any(0).sum()
    own = np.repeat([each.class_id for each in maps], len(dense) // len(maps))
    assert stats.agreement_top_k == pytest.approx((dense[np.arange(len(own)), own] > 0).mean())
    student = StudentSettings(0, 0, CropSettings())
    (scene,) = make_scenes(spec, maps[3], None, 3, student)
    shown = np.zeros((*spec.grid, spec.num_classes), np.float32)
    tokens = scene.tokens
    for entry in range(tokens.class_ids.shape[-1]):
        np.add.at(shown, (*np.indices(spec.grid), tokens.class_ids[..., entry]), tokens.probabilities[..., entry])
    np.testing.assert_allclose(shown, maps[3].dense()[0], atol=1e-4)
    (panel,) = (each for each in scene_panels(scene, spec.class_names, 0.5) if each.title == "confidence")
    assert panel.note == ("" if spec.top_k else f"share of {spec.draws} draw{'s' * (spec.draws > 1)}")


@pytest.mark.parametrize("name", ["one draw of crops", "hybrid", "class answers", "all"])
def test_sets_of_every_kind_are_merged_and_come_back(name, tmp_path, capsys):
    spec = make_spec(encoding="q8", container="webdataset", **KINDS[name])
    whole = make_arrays(spec)
    for part, rows in (("a", slice(0, 5)), ("b", slice(5, 12))):
        arrays = select(whole, rows)
        with LabelSetWriter(tmp_path / part, replace(spec, source=spec.source | {"samples": len(arrays)}), 1) as writer:
            writer.write_shard(0, arrays)
            writer.finish()
    run(capsys, "merge", tmp_path / "a", tmp_path / "b", tmp_path / "both")
    run(capsys, "verify", tmp_path / "both")
    merged = open_label_set(tmp_path / "both")
    write_set(tmp_path / "one", spec, 1)
    for key, expected in open_label_set(tmp_path / "one").items():
        for field in fields(LabelMap):
            np.testing.assert_array_equal(getattr(merged[key], field.name), getattr(expected, field.name))
    cache = build_token_cache(merged, whole.keys, whole.content_hash, spec.class_names, folder=tmp_path / "cache")
    np.testing.assert_array_equal(cache.entries(7)[0], merged[whole.keys[7]].entries()[0][0])


def test_sets_of_one_kind_are_merged_and_of_two_are_not(tmp_path, capsys):
    spec = make_spec(**KINDS["hybrid"])
    write_set(tmp_path / "a", spec, 2)
    other = make_spec(**KINDS["hybrid"] | {"draw_seed": 4})
    write_set(tmp_path / "b", other, 2)
    assert main(["labels", "merge", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")]) == 1
    assert "draw_seed is 3 and 4" in capsys.readouterr().err
