"""Training from images that are not packed: the same run as from packed ones, also when it goes on after a stop."""

import signal
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stl_offline.config import DumpConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.errors import InputError
from stl_offline.training.dry_run import dry_run
from stl_offline.training.optimization import TrainStep
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student


@pytest.fixture
def tars(stripes, tmp_path):
    """Training images in two tars, in no order, and validation images in one."""
    paths = sorted(Path(stripes[0]).rglob("*.jpg"))
    for number in range(2):
        with tarfile.open(tmp_path / f"train-{number}.tar", "w") as tar:
            for path in paths[number::2][::-1]:
                tar.add(path, path.relative_to(stripes[0]))
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(stripes[1], "")
    return {"data": str(tmp_path / "train-{0..1}.tar"), "val": str(tmp_path / "val.tar")}


def weights(run):
    return load_file(Path(run) / "weights.safetensors")


def test_a_student_from_tars_equals_one_from_packed_images(quick, tars, tmp_path, monkeypatch):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    labeler, labels = str(tmp_path / "labeler"), str(tmp_path / "labels")
    stream = {"loader": "stream"}
    train_labeler(LabelerConfig(**quick | tars | stream | {"out": labeler, "epochs": 1}))
    assert not (tmp_path / "cache" / "betons").exists()
    dump_labels(DumpConfig(data=tars["data"], labeler=labeler, out=labels, top_k=2, workers=1, device="cpu"))

    settings = quick | tars | {"labels": labels, "batch_size": 7, "cutmix": 1.0}
    packed = train_student(StudentConfig(**settings))
    whole = train_student(StudentConfig(**settings | stream | {"out": str(tmp_path / "stream")}))
    assert {name: whole[name] for name in ("top1", "token_top1", "loss")} == {
        name: packed[name] for name in ("top1", "token_top1", "loss")
    }
    # Stopped in the middle of the second epoch, it takes the steps that are left, however images are read then.
    stopped = StudentConfig(**settings | stream | {"out": str(tmp_path / "stopped")})
    taken = []
    original = TrainStep.__call__

    def step(self, *arguments):
        taken.append(len(taken))
        if len(taken) == 10:
            signal.raise_signal(signal.SIGTERM)
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(TrainStep, "__call__", step)
        train_student(stopped)
    assert len(taken) == 10
    train_student(StudentConfig(**settings | {"out": str(tmp_path / "stopped")}))
    ours = [weights(run) for run in (quick["out"], tmp_path / "stream", tmp_path / "stopped")]
    assert all(torch.equal(ours[0][name], other[name]) for other in ours[1:] for name in ours[0])


def test_packed_images_cannot_be_streamed(quick):
    config = LabelerConfig(**quick | {"data": "images.beton", "loader": "stream"})
    for use in (train_labeler, lambda config: dry_run(config, "labeler")):
        with pytest.raises(InputError, match=r"`loader` is stream, .* and images\.beton is packed"):
            use(config)
