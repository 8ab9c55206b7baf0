"""What label sets look like in numbers, against a count by hand of every token."""

import dataclasses
import json

import numpy as np
import pytest

from stl_offline.errors import FormatError, InputError
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.stats import measure, table, to_json
from tests.labels.synthetic import make_spec, write_set

SPEC = make_spec(samples=11, classes=9, grid=(3, 5), top_k=3, view_count=2)


@pytest.fixture(scope="module")
def label_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_set(path, SPEC, 4)
    return open_label_set(path)


def by_hand(label_set, shards):
    """Every number by going from token to token, through the front door."""
    maps = [label_set[key] for index in shards for key in label_set.read_index(index).keys]
    tokens = [
        (found.class_id, found.class_ids[place], found.probabilities()[place], float(found.confidence[place]))
        for found in maps
        for place in np.ndindex(found.confidence.shape)
    ]
    agreeing = 0
    for found in maps:
        names, counts = np.unique(found.class_ids[..., 0], return_counts=True)
        agreeing += names[counts == counts.max()][0] == found.class_id
    return {
        "samples": len(maps),
        "tokens": len(tokens),
        "histogram": [sum(min(int(each[3] * 10), 9) == place for each in tokens) for place in range(10)],
        "confidence": np.mean([each[3] for each in tokens]),
        "top_k_mass": np.mean([each[2].sum() for each in tokens]),
        "mass_by_rank": np.mean([each[2] for each in tokens], axis=0),
        "residual": np.mean([max(0, 1 - each[2].sum()) for each in tokens]),
        "over_half": np.mean([each[3] > 0.5 for each in tokens]),
        "agreement": np.mean([each[1][0] == each[0] for each in tokens]),
        "agreement_top_k": np.mean([each[0] in each[1] for each in tokens]),
        "image_agreement": agreeing / len(maps),
        "classes_best": len({int(each[1][0]) for each in tokens}),
        "classes_stored": len({int(name) for each in tokens for name in each[1]}),
        "bytes_per_image": sum(label_set.shards[index].bytes for index in shards) / len(maps),
    }


@pytest.mark.parametrize(("asked", "shards"), [(None, (0, 1, 2, 3)), (1, (0,)), (2, (0, 2)), (4, (0, 1, 2, 3))])
def test_against_a_count_by_hand(label_set, monkeypatch, asked, shards):
    read = []
    real = type(label_set).read_bytes
    monkeypatch.setattr(
        type(label_set), "read_bytes", lambda self, index, **options: read.append(index) or real(self, index, **options)
    )
    found = measure(label_set, shards=asked)
    assert sorted(read) == sorted(shards)  # no more than were asked for
    monkeypatch.undo()
    assert found.shards == len(shards)
    for name, expected in by_hand(label_set, shards).items():
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-5, err_msg=name)
    assert json.loads(json.dumps(to_json(found))) == to_json(found)
    assert to_json(found).keys() == {field.name for field in dataclasses.fields(found)}


def test_the_table_names_everything(label_set):
    text = "\n".join(f"{name} {value}" for name, value in table(measure(label_set)))
    for word in ("11 in 4 shards", "330, the 3 best of 9 classes", "confidence", "residual", "classes seen", "0.9–1.0"):
        assert word in text


def test_what_cannot_be_measured(label_set, tmp_path):
    for shards in (0, 5, -1):
        with pytest.raises(
            InputError, match=f"`shards` must lie between 1 and the 4 shards that are here, got {shards}"
        ):
            measure(label_set, shards=shards)
    write_set(tmp_path, SPEC, 2)
    damaged = open_label_set(tmp_path)
    (tmp_path / damaged.shards[1].name).unlink()
    with pytest.raises(FormatError, match=damaged.shards[1].name):
        measure(damaged)
    assert measure(damaged, shards=1).samples == 5
