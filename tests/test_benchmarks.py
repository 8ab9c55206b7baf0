"""Benchmarks are run by hand, so a change of what they call would break them unseen: small forms of some run here."""

import subprocess
import sys
import tarfile

import pytest
import timm

from stl_offline.demo.shapes import write_shapes
from stl_offline.models import ModelDescription, save_model
from tests.benchmarks import transfer_study
from tests.labels.synthetic import make_spec, write_set
from tests.source_tree import REPOSITORY
from tests.transfer.conftest import CLASSES, IGNORE, write_tar


def run(name: str, *arguments: object) -> list[str]:
    """The rows of a benchmark's table. name: of its file; or -m, with the module's name first among the arguments."""
    script = [name] if name == "-m" else [str(REPOSITORY / "tests" / "benchmarks" / name)]
    command = [sys.executable, *script, *map(str, arguments)]
    found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    return [line for line in found.stdout.splitlines() if line.startswith("|")][2:]


def test_targets_equal_the_dense_way():
    rows = run("target_speed.py", "--batch", 3, "--pairs", 1)
    assert [row.split("|")[1].strip() for row in rows] == 2 * ["gumbel", "soft", "argmax"]


@pytest.mark.slow
def test_the_loader_and_the_decoder_are_timed(tmp_path):
    images = write_shapes(tmp_path / "shapes", train=60, val=10) / "train"
    assert len(run("loader_speed.py", images, "--rounds", 1, "--passes", 1, "--batch-size", 20)) == 8
    assert run("decoder_speed.py", images, "--sides", 32, "--rounds", 1)


def test_filling_a_cache_of_draws_is_timed(tmp_path):
    write_set(tmp_path / "set", make_spec(samples=20))
    few = ["--images", 40, "--shards", 2, "--repeats", 2, "--draws", 1, "--encoding", "f16"]
    rows = run("-m", "tests.benchmarks.cache_fill", "--labels", tmp_path / "set", "--out", tmp_path / "out", *few)
    assert [row.split("|")[1].strip() for row in rows] == ["the label set's", "random"]


def test_the_transfer_study_scores_a_run_once(tmp_path):
    data = write_tar(tmp_path / "scenes.tar", {"train": range(4), "val": range(4, 6)}, (88, 112))
    words = ["--masks", data, "--classes", ",".join(CLASSES), "--ignore-id", IGNORE, "--out", tmp_path / "out"]
    words += ["--crop", 32, "--epochs", 1, "--head-width", 8, "--corrupt", "fog:3"]
    options = transfer_study.parse([str(word) for word in words])
    first, again = (transfer_study.score_of_run(options, ("random", f"timm:{options.model}", 0)) for _ in range(2))
    assert 0 <= first["corrupted_miou"] <= 1
    assert first | {"cpu_seconds": 0} == again | {"cpu_seconds": 0}
    assert len(list((tmp_path / "out").glob("masks/random-seed0/scores-*.json"))) == 1


@pytest.mark.slow
def test_the_transfer_study_compares_paired_seeds(tmp_path):
    data = write_tar(tmp_path / "scenes.tar", {"train": range(4), "val": range(4, 6)}, (88, 112))
    for seed in range(2):
        model = timm.create_model("fan_micro_4_p8_token", num_classes=3, img_size=32)
        description = ModelDescription("fan_micro_4_p8_token", ("a", "b", "c"), 32, "student")
        save_model(tmp_path / f"plain-seed{seed}" / "weights.safetensors", model.state_dict(), description)
    data_options = ["--masks", data, "--classes", ",".join(CLASSES), "--ignore-id", IGNORE, "--out", tmp_path / "out"]
    quick = ["--crop", 32, "--epochs", 1, "--seeds", 2, "--head-width", 8, "--corrupt", "fog:3"]
    arms = ["--base", "plain", "--pretrained", f"plain={tmp_path}/plain-seed*"]
    with pytest.raises(SystemExit, match="not complete, without summary.json: .*plain-seed0"):
        transfer_study.pretrained_runs(arms[-1:], 2)
    for seed in range(2):
        (tmp_path / f"plain-seed{seed}" / "summary.json").write_text("{}")
    rows = run("transfer_study.py", *data_options, *quick, *arms)
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [["random", "2"], ["plain", "2"]]
    assert rows[0].count("(SE ") == 3 and "(SE " not in rows[1]
    assert run("transfer_study.py", *data_options, *quick, *arms) == rows  # nothing is done again


@pytest.mark.slow
def test_labels_in_loops_of_ones_own_are_timed(tmp_path, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    images = write_shapes(tmp_path / "shapes", train=100, val=10)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(images / "train", "train")
    rows = run(
        "-m", "tests.benchmarks.stream_speed", "--data", tmp_path / "images.tar", "--out", tmp_path, "--rounds", 1
    )
    assert len(rows) == 6


@pytest.mark.slow
def test_the_study_of_other_models(tmp_path, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    images = write_shapes(tmp_path / "shapes", train=60, val=20)
    short = [word for name in ("seeds", "epochs", "labeler-epochs") for word in (f"--{name}", 1)]
    places = ["--train", images / "train", "--val", images / "val", "--out", tmp_path / "runs"]
    rows = run("-m", "tests.benchmarks.models_study", *places, *short)
    assert [row.split("|")[1].strip() for row in rows] == ["vit_micro_patch8_64", "regnetx_002"]
