"""Whether views agree on where the class is, against numpy's correlation."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.cli.main import main
from stl_offline.errors import InputError
from stl_offline.geometry import View
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.worth import agreement, measure_worth
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


def correlation(first, second):
    return np.corrcoef(first.ravel(), second.ravel())[0, 1]


def test_of_whole_images_it_is_the_correlation_of_the_cells():
    first, second = maps()
    expected = correlation(first, second)
    assert agreement(np.stack([first, second]), (WHOLE, WHOLE)) == pytest.approx(expected)


def test_a_flipped_view_of_the_same_labels_agrees():
    first = maps()[0]
    same = np.stack([first, first[:, ::-1]])
    assert agreement(same, (WHOLE, WHOLE.flipped())) == pytest.approx(1)
    # A flip that the set does not record is seen.
    assert agreement(same, (WHOLE, WHOLE)) == pytest.approx(correlation(first, first[:, ::-1]))


def test_a_crop_is_compared_with_its_part_of_the_image():
    first = maps()[0]
    part = first[1:3, 4:8].repeat(2, 0).repeat(2, 1)
    assert part.shape == first.shape
    right = View.crop(0.5, 0.25, 0.5, 0.5)
    assert agreement(np.stack([first, part]), (WHOLE, right)) == pytest.approx(1)
    left = View.crop(0, 0.25, 0.5, 0.5)
    assert agreement(np.stack([first, part]), (WHOLE, left)) == pytest.approx(
        correlation(first[1:3, :4], first[1:3, 4:])
    )


def test_views_without_a_common_part_and_constant_maps():
    left, right = View.crop(0, 0, 0.5, 1), View.crop(0.5, 0, 0.5, 1)
    assert agreement(maps(), (left, right)) is None
    # 32 · 32 points: three columns of four rows are fewer than 16.
    assert agreement(maps(), (View.crop(0, 0, 0.1, 0.125), View.crop(0, 0, 0.1, 0.125))) is None
    flat = maps()
    flat[1] = 0.3
    assert agreement(flat, (WHOLE, WHOLE)) == 0
    # As is what rounding leaves of a constant.
    flat[1] += np.linspace(0, 1e-9, 32).reshape(4, 8)
    assert agreement(flat, (WHOLE, WHOLE)) == 0


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 99), st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0.3, 0.5), st.floats(0.3, 0.5), st.booleans()
)
def test_it_is_symmetric_and_has_bounds(seed, left, top, width, height, flip):
    view = View.crop(left, top, width, height)
    view = view.flipped() if flip else view
    first, second = maps(seed)
    found = agreement(np.stack([first, second]), (WHOLE, view))
    assert abs(found) <= 1 + 1e-9
    assert agreement(np.stack([second, first]), (view, WHOLE)) == pytest.approx(found)


def test_a_set_is_the_mean_over_its_overlapping_views(place):
    label_set = open_label_set(place)
    expected, right = [], []
    for label_map in label_set.values():
        own = label_map.dense()[..., label_map.class_id]
        views = [View.from_array(each) for each in label_map.views]
        right.append(label_map.dense().mean((0, 1, 2), dtype=np.float64).argmax() == label_map.class_id)
        for first, second in ((0, 1), (1, 2)):
            value = agreement(own[[first, second]], (views[first], views[second]))
            expected += [] if value is None else [value]
    found = measure_worth(label_set)
    assert (found.samples, found.pairs) == (13, len(expected)) and 0 < len(expected) <= 26
    assert found.agreement == pytest.approx(np.mean(expected), abs=1e-5)
    assert found.right == np.mean(right) and found.score == found.agreement * found.right
    assert measure_worth(label_set, shards=2).samples < 13
    assert measure_worth(label_set, workers=2) == found


def test_the_command_prints_it(place, capsys):
    found = measure_worth(open_label_set(place))
    assert main(["labels", "stats", str(place), "--worth"]) == 0
    assert (
        f"worth:        {found.score:.3f}: {found.agreement:.3f} correlation of two views'" in capsys.readouterr().out
    )
    assert main(["labels", "stats", str(place), "--worth", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worth"] == vars(found) | {"score": found.score}
    assert main(["labels", "stats", str(place), "--json"]) == 0
    assert "worth" not in json.loads(capsys.readouterr().out)


def test_one_view_cannot_agree(tmp_path, capsys):
    write_set(tmp_path / "one", make_spec(), 2)
    with pytest.raises(InputError, match="one view per image"):
        measure_worth(open_label_set(tmp_path / "one"))
    assert main(["labels", "stats", str(tmp_path / "one"), "--worth"]) == 1
    error = capsys.readouterr().err
    assert "--views' of at least 2" in error and "stats:" not in error  # refused before anything is measured
