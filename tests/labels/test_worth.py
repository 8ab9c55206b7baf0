"""Whether views agree on where the class is, against numpy's covariance."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.cli.main import main
from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.worth import covariance, measure_worth
from tests.labels.synthetic import make_spec, write_set

WHOLE = View.identity()
SPEC = make_spec(samples=13, classes=6, top_k=3, view_count=3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels") / "set"
    write_set(path, SPEC, 4)
    return path


def maps(seed=0, shape=(2, 4, 8)):
    return np.random.default_rng(seed).random(shape)


def cov(first, second):
    return np.cov(first.ravel(), second.ravel(), bias=True)[0, 1]


def test_of_whole_images_it_is_the_covariance_of_the_cells():
    first, second = maps()
    expected = cov(first, second)
    assert covariance(np.stack([first, second]), (WHOLE, WHOLE)) == pytest.approx(expected)


def test_a_flipped_view_of_the_same_labels_agrees():
    first = maps()[0]
    same = np.stack([first, first[:, ::-1]])
    assert covariance(same, (WHOLE, WHOLE.flipped())) == pytest.approx(first.var())
    # A flip that the set does not record is seen.
    assert covariance(same, (WHOLE, WHOLE)) == pytest.approx(cov(first, first[:, ::-1]))


def test_a_crop_is_compared_with_its_part_of_the_image():
    first = maps()[0]
    part = first[1:3, 4:8].repeat(2, 0).repeat(2, 1)
    assert part.shape == first.shape
    right = View.crop(0.5, 0.25, 0.5, 0.5)
    assert covariance(np.stack([first, part]), (WHOLE, right)) == pytest.approx(part.var())
    left = View.crop(0, 0.25, 0.5, 0.5)
    assert covariance(np.stack([first, part]), (WHOLE, left)) == pytest.approx(cov(first[1:3, :4], first[1:3, 4:]))


def test_views_without_a_common_part_and_constant_maps():
    left, right = View.crop(0, 0, 0.5, 1), View.crop(0.5, 0, 0.5, 1)
    assert covariance(maps(), (left, right)) is None
    # 32 · 32 points: three columns of four rows are fewer than 16.
    assert covariance(maps(), (View.crop(0, 0, 0.1, 0.125), View.crop(0, 0, 0.1, 0.125))) is None
    flat = maps()
    flat[1] = 0.3
    assert covariance(flat, (WHOLE, WHOLE)) == pytest.approx(0, abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 99), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.3, 0.5), st.floats(0.3, 0.5), st.booleans()
)
def test_it_is_symmetric_and_has_bounds(seed, left, top, width, height, flip):
    view = View.crop(left, top, width, height)
    view = view.flipped() if flip else view
    first, second = maps(seed)
    found = covariance(np.stack([first, second]), (WHOLE, view))
    assert abs(found) <= 0.25  # of two variables in [0, 1]
    assert covariance(np.stack([second, first]), (view, WHOLE)) == pytest.approx(found)


def test_a_set_is_the_mean_over_its_overlapping_views(place):
    label_set = open_label_set(place)
    expected = []
    for label_map in label_set.values():
        own = label_map.dense()[..., label_map.class_id]
        views = [View.from_array(each) for each in label_map.views]
        for first, second in ((0, 1), (1, 2)):
            value = covariance(own[[first, second]], (views[first], views[second]))
            expected += [] if value is None else [value]
    found = measure_worth(label_set)
    assert (found.samples, found.pairs) == (13, len(expected)) and 0 < len(expected) <= 26
    assert found.covariance == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.score**2 == pytest.approx(abs(found.covariance)) and found.score * found.covariance >= 0
    assert measure_worth(label_set, shards=2).samples < 13
    assert measure_worth(label_set, workers=2) == found


def test_the_command_prints_it(place, capsys):
    found = measure_worth(open_label_set(place))
    assert main(["labels", "stats", str(place), "--worth"]) == 0
    assert f"worth:        {found.score:.3f} of probability: how much" in capsys.readouterr().out
    assert main(["labels", "stats", str(place), "--worth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worth"] == vars(found) | {"score": found.score}
    assert main(["labels", "stats", str(place), "--json"]) == 0
    assert "worth" not in json.loads(capsys.readouterr().out)


def test_one_view_cannot_agree(tmp_path, capsys):
    write_set(tmp_path / "one", make_spec(), 2)
    with pytest.raises(InputError, match="one view per image"):
        measure_worth(open_label_set(tmp_path / "one"))
    assert main(["labels", "stats", str(tmp_path / "one"), "--worth"]) == 1
    assert "`--views 2`" in capsys.readouterr().err
