"""How images are resized is an option of every stage, and what labels speak of is compared with what is shown."""

from dataclasses import replace

import pytest

from stl_offline.config import DumpConfig, EvaluateConfig, LabelerConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.errors import InputError
from stl_offline.evaluation import evaluate
from stl_offline.labels.label_set import open_label_set
from stl_offline.loader import DECODER
from stl_offline.models import read_description
from stl_offline.training import setup
from stl_offline.training.train_labeler import train_labeler
from stl_offline.training.train_student import train_student

MACHINE = {"batch_size": 15, "workers": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def chain(stripes, tmp_path_factory):
    """A labeler and its label set, both of images resized bicubically; and the dump's settings."""
    folder = tmp_path_factory.mktemp("bicubic")
    data = str(stripes[0])
    train_labeler(
        LabelerConfig(
            data=data,
            out=str(folder / "labeler"),
            img_size=32,
            epochs=1,
            interpolation="bicubic",
            ema_decay=0,
            **MACHINE,
        )
    )
    labeler, out = str(folder / "labeler"), str(folder / "labels")
    # A dump resizes as its labeler's run did, without being told.
    dump = DumpConfig(data=data, labeler=labeler, out=out, shards=1, top_k=2, **MACHINE)
    dump_labels(dump)
    return folder, dump


def test_the_manifest_and_the_weights_say_it(chain, tmp_path):
    folder, dump = chain
    seen = open_label_set(dump.out).spec.preprocessing
    assert (seen["interpolation"], seen["decoder"]) == ("bicubic", DECODER)
    assert open_label_set(dump.out).spec.creation["interpolation"] == "bicubic"
    assert read_description(folder / "labeler").interpolation == "bicubic"
    by_area = replace(dump, out=str(tmp_path / "area"), interpolation="area")
    dump_labels(by_area)
    key = next(iter(open_label_set(dump.out)))
    labels, others = (open_label_set(place)[key] for place in (dump.out, by_area.out))
    assert (labels.confidence != others.confidence).any()


def test_measuring_resizes_as_training_did(chain, stripes, monkeypatch):
    asked = []
    original = setup.TokenLoader

    def noted(*arguments, **settings):
        asked.append(arguments[1].interpolation)
        return original(*arguments, **settings)

    monkeypatch.setattr("stl_offline.evaluation.scoring.TokenLoader", noted)
    evaluate(EvaluateConfig(data=str(stripes[1]), checkpoint=str(chain[0] / "labeler"), workers=1, device="cpu"))
    assert asked == ["bicubic"]


@pytest.mark.parametrize(("interpolation", "lines"), [("bicubic", 0), ("area", 1)])
def test_a_student_that_sees_other_pixels_is_told_so(chain, tmp_path, caplog, interpolation, lines):
    _, dump = chain
    caplog.clear()
    settings = {"data": dump.data, "labels": dump.out, "out": str(tmp_path / "run"), "img_size": 32, "epochs": 1}
    train_student(StudentConfig(interpolation=interpolation, **settings, **MACHINE))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == lines
    assert all("resized by bicubic" in line and "resized by area" in line for line in told)


def test_an_unknown_one_is_refused():
    with pytest.raises(InputError, match="`interpolation` must be one of auto, area, bilinear, bicubic; got 'nearest'"):
        DumpConfig(data="x", labeler="y", out="z", interpolation="nearest")
