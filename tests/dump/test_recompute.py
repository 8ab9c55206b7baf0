"""``labels verify --recompute``: a sample of the images is labelled again, and what is not as it was is found."""

import dataclasses

import numpy as np
import pytest
import torch

from stl_offline.cli.main import main
from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels
from stl_offline.dump.recompute import compare, recompute_labels
from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.models import load_model, save_model


def make_set(work, out, **changes):
    dump_labels(DumpConfig(**work | {"shards": 3} | changes, out=str(out)))
    return open_label_set(out)


def again(label_set, work, **options):
    return recompute_labels(label_set, work["data"], work["labeler"], device="cpu", workers=1, **options)


@pytest.mark.parametrize("changes", [{"encoding": "q8"}, {"encoding": "f16", "crops_per_image": 2, "scale_min": 0.4}])
def test_a_set_is_what_its_labeler_says(work, tmp_path, changes):
    label_set = make_set(work, tmp_path / "set", **changes)
    found = again(label_set, work, images=12, seed=3)
    rows, columns = label_set.spec.grid
    assert (found.images, found.tokens) == (12, 12 * label_set.spec.views_per_image * rows * columns)
    assert found.top1 == 1 and found.beyond < 1e-5
    assert again(label_set, work, images=1000).images == 45


def test_labels_that_were_changed_are_found(work, tmp_path, capsys):
    honest = make_set(work, tmp_path / "honest", encoding="f16")
    with LabelSetWriter(tmp_path / "changed", honest.spec, [shard.samples for shard in honest.shards]) as writer:
        for index in honest.present:
            arrays = honest.read_shard(index)
            writer.write_shard(index, dataclasses.replace(arrays, class_ids=(arrays.class_ids + 1) % np.uint16(3)))
        writer.finish()
    arguments = ["--recompute", "9", "--labeler", work["labeler"], "--data", work["data"], "--device", "cpu"]
    assert main(["labels", "verify", str(tmp_path / "honest"), *arguments]) == 0
    out = capsys.readouterr().out
    assert "9 images labelled again; 100.00% of" in out
    assert main(["labels", "verify", str(tmp_path / "changed"), *arguments]) == 1
    captured = capsys.readouterr()
    assert "all 3 shards are whole" in captured.out  # which no checksum can tell
    assert captured.err.startswith("error: ") and "are not those of this labeler" in captured.err
    assert captured.err.count("\n") == 1


def test_changed_outputs_of_the_class_head_are_found(work, tmp_path, capsys):
    """In a set of draws, too, of whose tokens no classes are compared."""
    arguments = ["--recompute", "9", "--labeler", work["labeler"], "--data", work["data"], "--device", "cpu"]
    for top_k, draws in ((2, 0), (0, 1)):
        place = tmp_path / f"set{top_k}"
        honest = make_set(work, place, top_k=top_k, draws=draws, class_top_k=2, shards=1)
        assert main(["labels", "verify", str(place), *arguments]) == 0
        out = capsys.readouterr().out
        assert "100.00% of 9 outputs of the class head have the same class, probabilities differ" in out
        assert ("tokens have the same class" in out) == (top_k > 0)
        arrays = honest.read_shard(0)
        with LabelSetWriter(tmp_path / f"changed{top_k}", honest.spec, 1) as writer:
            writer.write_shard(0, dataclasses.replace(arrays, head_ids=(arrays.head_ids + 1) % np.uint16(3)))
            writer.finish()
        assert main(["labels", "verify", str(tmp_path / f"changed{top_k}"), *arguments]) == 1
        assert "are not those of this labeler" in capsys.readouterr().err
    place = tmp_path / "draws"
    make_set(work, place, top_k=0, draws=1, shards=1)
    assert main(["labels", "verify", str(place), *arguments]) == 0
    assert "have the same class" not in (out := capsys.readouterr().out) and "100.00% of 144 draws are the same" in out


def test_another_labeler_is_refused_by_name(work, tmp_path):
    label_set = make_set(work, tmp_path / "set")
    model, description = load_model(work["labeler"])
    weights = {
        name: value + 0.01 if torch.is_floating_point(value) else value for name, value in model.state_dict().items()
    }
    save_model(tmp_path / "other" / "weights.safetensors", weights, description)
    with pytest.raises(
        InputError, match=r"set was made with other settings \(its and these\): labeler.weights_sha256 is .* and "
    ):
        again(label_set, work | {"labeler": str(tmp_path / "other")})
    with pytest.raises(InputError, match="at least 1 image"):
        again(label_set, work, images=-1)


def test_wrong_calls(work, tmp_path, capsys):
    make_set(work, tmp_path / "set")
    assert main(["labels", "verify", str(tmp_path / "set"), "--recompute", "4"]) == 2
    assert "--recompute needs --labeler and --data" in capsys.readouterr().err


def test_differences_are_measured_against_the_bounds(work, tmp_path):
    label_set = make_set(work, tmp_path / "set", encoding="f16")
    arrays = label_set.read_shard(0)
    bounds = {"probability_relative": 0.02, "probability_absolute": 1e-4}
    assert compare(arrays, arrays, bounds).largest == 0
    confidence = arrays.confidence.astype("f4")
    confidence[2, 0, 1, 1] *= np.float32(0.9)
    found = compare(arrays, dataclasses.replace(arrays, confidence=confidence), bounds)
    true = float(arrays.confidence[2, 0, 1, 1])
    assert found.largest == pytest.approx(0.1 * true, rel=1e-3)
    assert found.beyond == pytest.approx(0.08 * true, rel=1e-3)
