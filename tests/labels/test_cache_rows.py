"""Rows of the token cache from shards of q8, and of draws, without the arrays in between: equal to the long way."""

import numpy as np
import pytest

from stl_offline.errors import FormatError
from stl_offline.labels import cache_rows
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.format import zarr_shard
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set


def forbidden(*_):
    raise AssertionError("the long way was taken")


def cache_and_maps(folder, spec, count):
    """The token cache of some images of a set of 23, in random order, and the label maps of the same images."""
    write_set(folder / "set", spec, 4)
    label_set = open_label_set(folder / "set")
    order = np.random.default_rng(count).permutation(23)[:count]
    keys = [make_key(position) for position in order]
    hashes = make_arrays(spec).content_hash[order]
    cache = build_token_cache(label_set, keys, hashes, spec.class_names, folder=folder / "cache")
    return cache, [label_set[key] for key in keys]


@pytest.mark.parametrize(("classes", "top_k", "views"), [(7, 4, 1), (7, 1, 2), (300, 5, 1), (70_000, 3, 1)], ids=str)
@pytest.mark.parametrize("count", [23, 9])
def test_equal_to_the_label_maps(tmp_path, monkeypatch, classes, top_k, views, count):
    grid = (3, 5) if classes < 1000 else (1, 2)
    spec = make_spec(samples=23, classes=classes, grid=grid, top_k=top_k, view_count=views, encoding="q8")
    monkeypatch.setattr(cache_rows, "_place_arrays", forbidden)
    cache, maps = cache_and_maps(tmp_path, spec, count)
    assert cache.labelled.all()
    for sample, labels in enumerate(maps):
        np.testing.assert_array_equal(cache.class_ids[sample], labels.class_ids)
        assert cache.class_ids.dtype == labels.class_ids.dtype
        assert cache.probabilities[sample].tobytes() == labels.probabilities().tobytes()
        assert cache.confidence[sample].tobytes() == labels.confidence.astype(np.float32).tobytes()
        assert cache.views[sample].tobytes() == labels.views.tobytes()


def rank_too_large(stored):
    stored["class_ranks"][5, 0, 1, 2, 1] = 60


def rank_twice(stored):
    stored["class_ranks"][5, 0, 1, 2, 1] = stored["class_ranks"][5, 0, 1, 2, 0]


def gaps_too_wide(stored):
    stored["logit_gaps"][5, 0, 1, 2] = 200


def class_too_large(stored):
    stored["palette"][0] = 500


def class_listed_twice(stored):
    stored["palette"][1] = 0


def palette_too_long(stored):
    stored["palette"] = np.append(stored["palette"], stored["palette"][:1])


def confidence_of_nothing(stored):
    stored["confidence_steps"][5, 0, 1, 2] = 60_000


def view_without_inverse(stored):
    stored["views"][5, 0, 0] = 0


def draw_too_large(stored):
    stored["draws"][5, 0, 1, 2] = 7


DRAWS = {"encoding": "f16", "top_k": 0, "draws": 2, "has_confidence": False}


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (rank_too_large, {}),
        (rank_twice, {}),
        (gaps_too_wide, {}),
        (class_too_large, {}),
        (class_listed_twice, {}),
        (palette_too_long, {}),
        (confidence_of_nothing, {}),
        (view_without_inverse, {}),
        (draw_too_large, DRAWS),
        (view_without_inverse, DRAWS),
    ],
)
def test_a_shard_that_lies_under_a_right_checksum_is_refused(tmp_path, monkeypatch, damage, kind):
    spec = make_spec(samples=8, **{"encoding": "q8"} | kind)
    real = zarr_shard.to_stored

    def damaged(arrays, spec):
        stored = {name: values.copy() for name, values in real(arrays, spec).items()}
        damage(stored)
        return stored

    monkeypatch.setattr(zarr_shard, "to_stored", damaged)
    with LabelSetWriter(tmp_path / "set", spec, 1) as writer:
        writer.write_shard(0, make_arrays(spec))
        writer.finish()
    label_set = open_label_set(tmp_path / "set")
    keys = [make_key(position) for position in range(8)]
    with pytest.raises(FormatError, match="labels-00000-of-00001"):
        build_token_cache(label_set, keys, make_arrays(spec).content_hash, spec.class_names, folder=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize(("classes", "draws", "views"), [(7, 1, 1), (300, 3, 2), (70_000, 2, 1)], ids=str)
@pytest.mark.parametrize("count", [23, 9])
def test_draws_alone_equal_the_label_maps(tmp_path, monkeypatch, classes, draws, views, count):
    kind = {"top_k": 0, "draws": draws, "has_confidence": False}
    spec = make_spec(samples=23, classes=classes, grid=(2, 3), view_count=views, **kind)
    monkeypatch.setattr(cache_rows, "_place_arrays", forbidden)
    cache, maps = cache_and_maps(tmp_path, spec, count)
    assert cache.labelled.all()
    for sample, labels in enumerate(maps):
        for view in range(views):
            np.testing.assert_array_equal(cache.entries(sample, view)[0], labels.draws[view])
        assert cache.views[sample].tobytes() == labels.views.tobytes()


@pytest.mark.parametrize("kind", ["q8", "f16", "draws"])
def test_images_of_equal_content_share_a_label(tmp_path, kind):
    """Several images may have one row of a shard, under any keys."""
    changes = {"encoding": kind} if kind != "draws" else {"draws": 1, "top_k": 0, "has_confidence": False}
    spec = make_spec(samples=23, view_count=2, **changes)
    write_set(tmp_path / "set", spec, 2)
    label_set = open_label_set(tmp_path / "set")
    rows = [7, 3, 7, 20, 7, 3]
    hashes = make_arrays(spec).content_hash[rows]
    keys = [f"{place}.png" for place in range(len(rows))]
    cache = build_token_cache(
        label_set, keys, hashes, spec.class_names, match="content", missing="skip", folder=tmp_path / "cache"
    )
    assert cache.labelled.all()
    for sample, row in enumerate(rows):
        labels = label_set[make_key(row)]
        assert cache.views[sample].tobytes() == labels.views.tobytes()
        if kind == "draws":
            for view in range(2):
                np.testing.assert_array_equal(cache.entries(sample, view)[0], labels.draws[view])
        else:
            np.testing.assert_array_equal(cache.class_ids[sample], labels.class_ids)
            np.testing.assert_allclose(cache.probabilities[sample], labels.probabilities(), rtol=1e-6)
            np.testing.assert_allclose(cache.confidence[sample], labels.confidence, rtol=1e-3)
