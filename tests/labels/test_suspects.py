"""Images whose tokens disagree with their class, against a search by hand."""

import json

import numpy as np
import pytest

from stl_offline.cli.main import main
from stl_offline.errors import InputError
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.suspects import find_suspects
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SPEC = make_spec(samples=13, classes=6, top_k=3, view_count=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "set"
    write_set(path, SPEC, 4)
    return path


def by_hand(label_set):
    scores = []
    for key, label_map in label_set.items():
        means = label_map.dense().mean(axis=(0, 1, 2), dtype=np.float64)
        others = np.delete(means, label_map.class_id)
        suggestion = np.delete(np.arange(len(means)), label_map.class_id)[others.argmax()]
        score = np.log((others.max() + 1e-5) / (means[label_map.class_id] + 1e-5))
        scores.append((score, key, int(suggestion)))
    return sorted(scores, reverse=True)


def test_the_most_doubtful_come_first(place):
    label_set = open_label_set(place)
    found = find_suspects(label_set, 5)
    expected = by_hand(label_set)[:5]
    assert [(suspect.key, suspect.suggestion) for suspect in found] == [(key, other) for _, key, other in expected]
    np.testing.assert_allclose([suspect.score for suspect in found], [score for score, *_ in expected], atol=1e-6)
    for suspect in found:
        assert label_set.read_index(suspect.shard).keys[suspect.row] == suspect.key
        assert suspect.class_id == label_set[suspect.key].class_id != suspect.suggestion
    assert len(find_suspects(label_set, 50)) == 13


def test_an_image_in_a_wrong_class_is_found(tmp_path):
    arrays = make_arrays(SPEC)
    # Every token of every image shows its class for sure, but for one image.
    ids = (arrays.class_id[:, None, None, None, None] + np.arange(3)) % SPEC.num_classes
    ids = np.broadcast_to(ids, arrays.class_ids.shape).astype(arrays.class_ids.dtype).copy()
    ids[7] = (ids[7] + 2) % SPEC.num_classes
    values = {"class_ids": ids, "logits": np.broadcast_to(np.float16([3, 1, 0]), arrays.logits.shape).copy()}
    values["confidence"] = np.full_like(arrays.confidence, 0.8)
    with LabelSetWriter(tmp_path / "set", SPEC, 1) as writer:
        writer.write_shard(0, type(arrays)(**{**vars(arrays), **values}))
        writer.finish()
    (suspect,) = find_suspects(open_label_set(tmp_path / "set"), 1)
    assert (suspect.key, suspect.class_id, suspect.suggestion) == (make_key(7), 1, 3)
    assert suspect.score == pytest.approx(np.log(0.8 / 1e-5), abs=1e-3)


def test_classes_that_no_image_has_are_no_suggestion(tmp_path):
    """As of a labeler of ImageNet's classes on images of a few of them."""
    arrays = make_arrays(SPEC)
    values = {"class_id": np.where(np.arange(len(arrays)) < 7, 1, 4).astype(arrays.class_id.dtype)}
    # The best class is one that no image has, the second is right, but for one image, of which it is the other one.
    ids = np.zeros_like(arrays.class_ids)
    ids[..., 0], ids[..., 1], ids[..., 2] = 5, values["class_id"][:, None, None, None], 2
    ids[3, ..., 1] = 4
    values |= {"class_ids": ids, "logits": np.broadcast_to(np.float16([2, 1, 0]), arrays.logits.shape).copy()}
    values["confidence"] = np.full_like(arrays.confidence, 0.6)
    with LabelSetWriter(tmp_path / "set", SPEC, 2) as writer:
        for shard in range(2):
            first, last = writer.shard_range(shard)
            part = {name: each[first:last] for name, each in vars(type(arrays)(**{**vars(arrays), **values})).items()
                    if each is not None}  # fmt: skip
            writer.write_shard(shard, type(arrays)(**part))
        writer.finish()
    found = find_suspects(open_label_set(tmp_path / "set"), 13)
    assert (found[0].key, found[0].class_id, found[0].suggestion) == (make_key(3), 1, 4)
    assert {suspect.suggestion for suspect in found} == {1, 4}
    assert found[1].score < 0 < found[0].score


def test_the_commands_show_them(place, tmp_path, capsys):
    keys = [suspect.key for suspect in find_suspects(open_label_set(place), 2)]
    assert main(["labels", "stats", str(place), "--suspects", "2"]) == 0
    text = capsys.readouterr().out
    assert text.index(keys[0]) < text.index(keys[1]) and "tokens show class" in text
    assert main(["labels", "stats", str(place), "--suspects", "2", "--json"]) == 0
    assert [each["key"] for each in json.loads(capsys.readouterr().out)["suspects"]] == keys
    assert main(["labels", "preview", str(place), "--suspects", "2", "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "labels.html").read_text()
    assert page.count("<article ") == 2 and page.index(keys[0]) < page.index(keys[1])
    assert "those whose tokens disagree most with their class first" in page


def test_shards_are_chosen_as_for_the_other_figures(tmp_path, capsys):
    write_set(tmp_path / "four", SPEC, shards=4)
    label_set = open_label_set(tmp_path / "four")
    found = find_suspects(label_set, 50, shards=2)
    expected = [key for shard in (0, 2) for key in label_set.read_index(shard).keys]
    assert sorted(suspect.key for suspect in found) == sorted(expected)
    assert main(["labels", "stats", str(tmp_path / "four"), "--suspects", "50", "--shards", "2", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["shards"] == 2 and len(shown["suspects"]) == len(expected)


def test_what_cannot_be_asked(place, tmp_path, capsys):
    assert main(["labels", "stats", str(place), "--suspects", "0"]) == 2
    assert main(["labels", "preview", str(place), "--suspects", "2", "--key", "*", "--out", str(tmp_path / "x")]) != 0
    assert "--suspects and --key both choose the images; give one of them" in capsys.readouterr().err
    write_set(tmp_path / "one", make_spec(classes=1, top_k=1))
    with pytest.raises(InputError, match="a single class"):
        find_suspects(open_label_set(tmp_path / "one"), 1)
