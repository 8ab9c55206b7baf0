"""Every command on label sets takes every kind of labels."""

import json

import pytest

from stl_offline.cli.main import main
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS
from tests.labels.format.test_version2 import KINDS
from tests.labels.synthetic import make_spec, write_set


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
    run(capsys, "stats", tmp_path / "a", "--suspects", 3)
    for container in CONTAINERS:
        run(capsys, "convert", tmp_path / "a", tmp_path / container, "--format", container, "--shards", 3)
        assert spec.format_version == open_label_set(tmp_path / container).spec.format_version
    run(capsys, "push", tmp_path / "webdataset", tmp_path / "store")
    run(capsys, "pull", tmp_path / "store", tmp_path / "part", "--shards", "1")
    run(capsys, "verify", tmp_path / "part")
    card = (tmp_path / "webdataset" / "README.md").read_text()
    assert "labels.npz" in card
    run(capsys, "preview", tmp_path / "a", "--samples", 2, "--out", tmp_path / "page")


def test_sets_of_one_kind_are_merged_and_of_two_are_not(tmp_path, capsys):
    spec = make_spec(**KINDS["hybrid"])
    write_set(tmp_path / "a", spec, 2)
    other = make_spec(**KINDS["hybrid"] | {"draw_seed": 4})
    write_set(tmp_path / "b", other, 2)
    assert main(["labels", "merge", str(tmp_path / "a"), str(tmp_path / "b"), str(tmp_path / "out")]) == 1
    assert "draw_seed is 3 and 4" in capsys.readouterr().err
