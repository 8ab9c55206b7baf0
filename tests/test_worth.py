"""What corrupts a label set on purpose, and what measures it, in tests/benchmarks/worth.py."""

import dataclasses
import sys

import numpy as np
import pytest

import stl_offline as stl
from stl_offline.labels.arrays import probabilities
from tests.benchmarks import emergence, worth
from tests.labels.synthetic import make_arrays, make_spec

ARRAYS = make_arrays(make_spec(samples=23, classes=6, top_k=3, view_count=2))


def changed(change):
    return dataclasses.replace(ARRAYS, **change(ARRAYS, np.random.default_rng(0)))


def test_shuffled_tokens_are_the_same_tokens_elsewhere():
    found = changed(worth.shuffle_tokens)
    for row in range(len(ARRAYS)):
        tokens, moved = (
            np.concatenate([part.reshape(2, -1, 3) for part in (each.class_ids[row], each.logits[row])], -1)
            for each in (ARRAYS, found)
        )
        for before, after in zip(tokens, moved, strict=True):
            assert sorted(before.tolist()) == sorted(after.tolist()) and (before != after).any()


def test_mirrored_maps_are_columns_in_reverse():
    found = changed(worth.mirror)
    np.testing.assert_array_equal(found.confidence, ARRAYS.confidence[..., ::-1])
    np.testing.assert_array_equal(found.class_ids[:, :, :, 0], ARRAYS.class_ids[:, :, :, -1])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_maps_of_other_images(share):
    found = changed(worth.other_images(share))
    moved = [not np.array_equal(*pair) for pair in zip(found.logits, ARRAYS.logits, strict=True)]
    assert sum(moved) == round(share * len(ARRAYS))
    assert found.keys == ARRAYS.keys


def test_maps_of_other_images_of_the_class():
    found = changed(worth.same_class)
    for row, logits in enumerate(found.logits):
        (source,) = (other for other, maps in enumerate(ARRAYS.logits) if np.array_equal(maps, logits))
        assert ARRAYS.class_id[source] == ARRAYS.class_id[row] and source != row


def test_the_class_everywhere():
    found = changed(worth.own_class)
    assert (found.class_ids[..., 0] == ARRAYS.class_id[:, None, None, None]).all()
    np.testing.assert_allclose(probabilities(found.logits, found.confidence).sum(-1), 1, atol=1e-3)


def test_scores_of_a_set_by_hand(tmp_path):
    spec = make_spec(samples=2, classes=4, top_k=1, grid=(1, 3), view_count=2)
    arrays = make_arrays(spec)
    # Both views show the whole image, and the same.
    ids = np.array([[0, 0, 1], [3, 2, 2]], arrays.class_ids.dtype).reshape(2, 1, 1, 3, 1).repeat(2, axis=1)
    views = np.broadcast_to(np.array([1, 0, 0, 0, 1, 0], arrays.views.dtype), arrays.views.shape).copy()
    own = np.array([0, 3], arrays.class_id.dtype)
    values = {"class_id": own, "class_ids": ids, "views": views}
    values["confidence"] = np.full_like(arrays.confidence, 0.75)
    with stl.LabelSetWriter(tmp_path / "set", spec, 1) as writer:
        writer.write_shard(0, dataclasses.replace(arrays, **values))
        writer.finish()
    found = worth.scores(stl.open_label_set(tmp_path / "set"))
    assert found["tokens of the class"] == pytest.approx(1 / 2)
    assert found["images of the class"] == pytest.approx(1 / 2)
    assert found["confidence"] == pytest.approx(13 / 16, abs=1e-3)  # with its part of the residual
    assert found["minus calibration error"] == pytest.approx(-5 / 16, abs=1e-3)
    assert found["neighbours agree"] == pytest.approx(1 / 2)
    assert found["labels stats --worth"] == pytest.approx(1 / 2)  # views correlate by 1, and one image is right


@pytest.mark.slow
def test_both_benchmarks_run(tmp_path, monkeypatch, capsys):
    small = ["--out", str(tmp_path), "--train", "60", "--val", "20", "--seeds", "1", "--only"]
    monkeypatch.setattr(sys, "argv", ["emergence", "--epochs", "1", *small, "lme-depth-2", "mean-scenes"])
    emergence.main()
    assert [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines()[2:]] == [
        "lme-depth-2",
        "mean-scenes",
    ]
    monkeypatch.setattr(sys, "argv", ["worth", *small, "the image's class everywhere", "lme, --select own"])
    worth.main()
    rows = [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines() if row.startswith("|")]
    assert rows == ["labels", "---", "the image's class everywhere", "lme, --select own"]
