"""Different views of one family: one set of several parts, pulled by views, and several sets that train as one."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError, InputError, JoinError
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.cache import CacheMaker, build_token_cache
from stl_offline.labels.card import make_card
from stl_offline.labels.convert import convert
from stl_offline.labels.families import group_families, in_view_order
from stl_offline.labels.format import encode_shard
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.merge import merge, merge_views
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.stats import measure
from stl_offline.labels.store.storage import ObjectStorage
from stl_offline.labels.transfer import pull, push
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files
from tests.labels.synthetic import make_arrays, make_spec, write_set

SAMPLES, VIEWS = 11, 7
KINDS = {
    "zarr-1": {"encoding": "q8"},
    "zarr-2": {"top_k": 2, "draws": 3, "encoding": "q8", "has_augmentation": True},
    "webdataset-1": {"container": "webdataset"},
    "webdataset-2": {"container": "webdataset", "top_k": 0, "draws": 2, "has_confidence": False, "class_top_k": 2},
}


def of_views(arrays, views):
    """Labels of some of the views."""
    values = {}
    for field in dataclasses.fields(ShardArrays):
        value = getattr(arrays, field.name)
        if isinstance(value, np.ndarray) and value.ndim > 1:
            value = value[:, views.start : views.stop]
        elif field.name == "augmentation" and value is not None:
            value = ['[{"op": "größe"}' + ', {"op": "größe"}' * (len(views) - 1) + "]"] * len(value)
        values[field.name] = value
    return ShardArrays(**values)


def write_views(path, whole, wanted, shards=2, first=0, **changes):
    """A set of some of a family's views, as ``dump-labels --first-view`` makes it."""
    spec = dataclasses.replace(whole, format_version=None, views=whole.views | ({"first": first} if first else {}))
    spec = spec.of_views(wanted)
    spec = dataclasses.replace(spec, **{"creation": {"views": len(wanted), "top_k": 4}} | changes)
    with LabelSetWriter(path, spec, shards) as writer:
        for index in writer.todo():
            arrays = of_views(make_arrays(whole, *writer.shard_range(index)), wanted)
            writer.write_shard(index, arrays)
        writer.finish()
    return open_label_set(path)


@pytest.fixture(params=KINDS)
def family(request, tmp_path):
    """The spec of seven views, and sets of views 0-1, 2-5 and 6, in other numbers of shards each."""
    spec = make_spec(samples=SAMPLES, view_count=VIEWS, **KINDS[request.param])
    bounds = ((0, 2, 2), (2, 6, 3), (6, 7, 1))
    return spec, [write_views(tmp_path / f"views{a}", spec, range(a, b), shards) for a, b, shards in bounds]


def check_maps(label_set, spec, views=None):
    """Every label map has the numbers of these views."""
    whole = make_arrays(spec)
    views = views or range(VIEWS)
    assert list(label_set) == whole.keys and len(label_set) == SAMPLES
    for row, label_map in enumerate(label_set.values()):
        mine = label_set[label_map.key] if row % 4 == 0 else label_map
        np.testing.assert_array_equal(mine.views, whole.views[row, views.start : views.stop])
        np.testing.assert_array_equal(mine.class_ids, whole.class_ids[row, views.start : views.stop])
        if whole.draws is not None:
            np.testing.assert_array_equal(mine.draws, whole.draws[row, views.start : views.stop])


def test_many_parts_are_opened_once_each(tmp_path, monkeypatch):
    """A spec holds all class names, and one is made of each part, not of each part for each part."""
    write_set(tmp_path / "whole", make_spec(samples=2, view_count=40, format_version=2), 1)
    convert(open_label_set(tmp_path / "whole"), tmp_path / "parts", views_per_part=1)
    made, check = [], LabelSpec.__post_init__
    monkeypatch.setattr(LabelSpec, "__post_init__", lambda spec: made.append(0) or check(spec))
    assert len(open_label_set(tmp_path / "parts").parts) == 40
    assert len(made) < 3 * 40
    check_sizes = [len(part) for part in open_label_set(tmp_path / "parts").parts]
    assert check_sizes == [2] * 40


def test_parts_become_one_set(family, tmp_path):
    spec, sets = family
    manifest = merge_views([sets[2], sets[0], sets[1]], tmp_path / "all")
    merged = open_label_set(tmp_path / "all")
    assert merged.manifest == manifest
    assert (merged.spec.views_per_image, merged.spec.views["parts"], merged.spec.format_version) == (7, [2, 4, 1], 2)
    assert [len(part) for part in merged.parts] == [SAMPLES] * 3
    check_maps(merged, spec)
    assert verify(merged).faults == () and verify(merged).samples == SAMPLES
    # What is of version 2 already is copied byte for byte.
    copies = [part.read_bytes(index) for part in sets for index in part.present if part.spec.format_version == 2]
    assert copies and copies == [merged.read_bytes(index) for index in merged.present][-len(copies) :]
    before = files(tmp_path / "all")
    merge_views(
        [open_label_set(tmp_path / "all"), write_views(tmp_path / "more", spec, range(2), first=7)], tmp_path / "9"
    )
    assert open_label_set(tmp_path / "9").spec.views["parts"] == [2, 4, 1, 2]
    merge_views(sets, tmp_path / "all")
    assert files(tmp_path / "all") == before


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, VIEWS - 1), max_size=3), order=st.randoms(use_true_random=False))
def test_however_views_are_cut_they_train_the_same(tmp_path_factory, cuts, order):
    """The token cache of any cut of the views, as several sets or as one, is that of one set with all of them."""
    folder = tmp_path_factory.mktemp("cuts")
    spec = make_spec(samples=SAMPLES, view_count=VIEWS, top_k=2, draws=1, encoding="q8")
    write_set(folder / "whole", spec, 2)
    whole = open_label_set(folder / "whole")
    images = (list(whole), make_arrays(spec).content_hash, spec.class_names)
    expected = build_token_cache(whole, *images, folder=folder / "cache")
    bounds = [0, *sorted(cuts), VIEWS]
    sets = [write_views(folder / f"part{a}", spec, range(a, b), 1 + a % 3) for a, b in itertools.pairwise(bounds)]
    order.shuffle(sets)
    (group,) = group_families(sets)
    policy = {"match": "key", "missing": "error", "allow_changed": False}
    maker = CacheMaker(group, *images, folder=folder / "parts", **policy)
    found = [maker.make(maker.views), *([maker.make(range(1, 4))])]
    if len(sets) > 1:
        merge_views(sets, folder / "merged")
        found.append(build_token_cache(open_label_set(folder / "merged"), *images, folder=folder / "cache"))
    for cache in found:
        views = slice(1, 4) if cache.views.shape[1] == 3 else slice(0, VIEWS)
        for name in ("class_ids", "probabilities", "confidence", "draws", "views"):
            np.testing.assert_array_equal(getattr(cache, name), getattr(expected, name)[:, views], err_msg=name)


def test_a_third_of_the_views_is_a_third_of_the_bytes(tmp_path, monkeypatch):
    """Counted where they are read: at most 1.2 times the share of the views, manifest and card included."""
    spec = make_spec(samples=30, view_count=30, grid=(5, 6), classes=50, top_k=5, encoding="q8")
    sets = [write_views(tmp_path / f"v{a}", spec, range(a, a + 10)) for a in (0, 10, 20)]
    merge_views(sets, tmp_path / "all")
    push(open_label_set(tmp_path / "all"), "memory://families/all")
    read = []
    original = ObjectStorage.read

    def count(storage, name, size=None):
        read.append(original(storage, name, size))
        return read[-1]

    monkeypatch.setattr(ObjectStorage, "read", count)
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    total = sum(len(data) for data in files(tmp_path / "all").values())
    pull(open_label_set("memory://families/all"), tmp_path / "some", views="10-19")
    assert 0.8 * 10 / 30 * total < sum(map(len, read)) <= 1.2 * 10 / 30 * total
    some = open_label_set(tmp_path / "some")
    assert (some.spec.first_view, some.spec.views_per_image) == (10, 10) and len(some.parts) == 1
    assert some.spec.views == sets[1].spec.views
    whole = make_arrays(spec)
    np.testing.assert_array_equal(np.stack([each.class_ids for each in some.values()]), whole.class_ids[:, 10:20])
    assert measure(some).samples == 30
    read.clear()
    pull(open_label_set("memory://families/all"), tmp_path / "some", views="25")
    assert open_label_set(tmp_path / "some").spec.views["parts"] == [10, 10]
    pull(open_label_set("memory://families/all"), tmp_path / "gap", views="0,29")
    with pytest.raises(FormatError, match=r"lacks the views 10-19 between .*`pull\(views=\"10-19\"\)`"):
        open_label_set(tmp_path / "gap")
    for views, words in (("0-30", "there are no views 0-30: the label set has 0 to 29"), ("x", "names no views")):
        with pytest.raises(InputError, match=words):
            pull(open_label_set("memory://families/all"), tmp_path / "no", views=views)
    with pytest.raises(InputError, match="exclude each other"):
        pull(some, tmp_path / "no", views="10", shards="0")


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_views_that_lie_in_every_shard_cannot_be_pulled_alone(tmp_path, container):
    write_set(tmp_path / "set", make_spec(view_count=4, container=container), 2)
    label_set = open_label_set(tmp_path / "set")
    with pytest.raises(
        InputError, match=r"every shard of .* holds all of its views .0-3.*`convert\(views_per_part=1\)`"
    ):
        pull(label_set, tmp_path / "some", views="0-1")
    assert pull(label_set, tmp_path / "all", views="0-3").sent == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_is_divided_into_parts_and_put_together_again(tmp_path, kind, monkeypatch):
    """As sets of these views alone, merged by views: byte for byte, wherever the division was interrupted."""
    spec = make_spec(samples=SAMPLES, view_count=VIEWS, **KINDS[kind])
    creation = {"creation": {"seed": 3}}
    whole = write_views(tmp_path / "whole", spec, range(VIEWS), 3, **creation)
    sets = [write_views(tmp_path / f"v{a}", spec, range(a, min(a + 3, VIEWS)), 3, **creation) for a in (0, 3, 6)]
    merge_views(sets, tmp_path / "merged")
    original, reads = LabelSet.read_shard, []
    monkeypatch.setattr(LabelSet, "read_shard", lambda self, index: reads.append(index) or original(self, index))
    convert(whole, tmp_path / "parts", views_per_part=3, workers=1)
    assert files(tmp_path / "parts") == files(tmp_path / "merged")
    assert reads == [0, 1, 2]
    parts = open_label_set(tmp_path / "parts")
    check_maps(parts, spec)
    # Parts are kept, changed, and left again.
    convert(parts, tmp_path / "copy")
    assert files(tmp_path / "copy") == files(tmp_path / "parts")
    other = {"webdataset": "zarr", "zarr": "webdataset"}[spec.container]
    convert(parts, tmp_path / "other", container=other, shards=2, views_per_part=2)
    assert open_label_set(tmp_path / "other").spec.views["parts"] == [2, 2, 2, 1]
    convert(open_label_set(tmp_path / "other"), tmp_path / "back", container=spec.container, shards=3, views_per_part=3)
    assert files(tmp_path / "back") == files(tmp_path / "parts")
    lowest = spec.format_version
    convert(parts, tmp_path / "one", views_per_part=VIEWS, format_version=lowest)
    assert files(tmp_path / "one") == files(tmp_path / "whole")


def test_what_cannot_be_divided(tmp_path):
    whole = write_views(tmp_path / "whole", make_spec(samples=SAMPLES, view_count=VIEWS), range(VIEWS))
    with pytest.raises(InputError, match="`views_per_part` must be at least 1, got 0"):
        convert(whole, tmp_path / "o", views_per_part=0)
    with pytest.raises(InputError, match=r"format version 1 has no views\.parts"):
        convert(whole, tmp_path / "o", views_per_part=2, format_version=1)
    assert not (tmp_path / "o").exists()
    convert(whole, tmp_path / "o", views_per_part=VIEWS + 1)
    assert files(tmp_path / "o") == files(tmp_path / "whole")


def test_sets_that_are_no_parts_of_one_set(tmp_path):
    spec = make_spec(samples=SAMPLES, view_count=VIEWS)
    first, rest = write_views(tmp_path / "a", spec, range(3)), write_views(tmp_path / "b", spec, range(3, 5))
    end = write_views(tmp_path / "c", spec, range(6, 7))
    both = write_views(tmp_path / "d", spec, range(2, 6))
    whole = tmp_path / "whole"
    write_set(whole, make_spec(samples=SAMPLES))
    cases = [
        ([first, end, rest], r"no label set holds the views 5-5, .*`first_view=5` and `crops_per_image=1`"),
        ([first, both], "a and .*d both hold the views 2-2"),
        ([both, rest], "both hold the views 3-4"),
        ([first, first], "both hold the views 0-2"),
        ([open_label_set(whole), rest], "whole images"),
    ]
    for name, changes in {
        "views.seed": {"views": rest.spec.views | {"seed": 4}},
        "views.scale": {"views": rest.spec.views | {"scale": [0.25, 1.0]}},
        "labeler.weights_sha256": {"labeler": spec.labeler | {"weights_sha256": "1" * 64}},
        "source.fingerprint": {"source": spec.source | {"fingerprint": "other"}},
    }.items():
        other = write_views(tmp_path / name, spec, range(3, 5), **changes)
        cases.append(([first, other], f"hold no views of one family: {name} is"))
        assert group_families([first, other]) == [[first], [other]]
    for sets, words in cases:
        with pytest.raises(InputError, match=words):
            merge_views(sets, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert in_view_order([rest, first]) == [first, rest]
    merge_views([first, rest], tmp_path / "two")
    two = open_label_set(tmp_path / "two")
    for work in (measure, lambda each: merge([each, first], tmp_path / "o")):
        with pytest.raises(InputError, match=r"holds its views in 2 parts, .*`pull\(views=\"0-2\"\)`"):
            work(two)
    with pytest.raises(JoinError, match="no label for the key 'none'"):
        two["none"]


def test_parts_of_different_images_are_refused(tmp_path):
    """An image would have labels for some of its views, and made-up ones for the others."""
    write_set(tmp_path / "one", make_spec(samples=12, view_count=4, grid=(3, 2)), 2)
    convert(open_label_set(tmp_path / "one"), tmp_path / "parts", views_per_part=2)
    parts = open_label_set(tmp_path / "parts")
    assert len(parts.shards) == 4
    for shards in ("0-2", "0,3", "1-3"):
        with pytest.raises(InputError, match="hold views of different images; pull the shards of the same images"):
            pull(parts, tmp_path / "some", shards=shards)
        with pytest.raises(InputError, match="hold views of different images"):
            LabelSet(parts.storage, parts.manifest, (0, 1, 2))
        assert not (tmp_path / "some").exists()
    pull(parts, tmp_path / "some", shards="1,3")
    some = open_label_set(tmp_path / "some")
    assert len(some) == 6 == len(list(some.values())) and some.spec.views_per_image == 4
    with pytest.raises(InputError, match="hold views of different images"):
        pull(parts, tmp_path / "some", shards="0")
    pull(parts, tmp_path / "first", shards="0")
    assert len(open_label_set(tmp_path / "first")) == 6


@pytest.mark.parametrize("container", ["zarr", "webdataset"])
def test_tars_that_shards_were_made_of_stay_known(container, tmp_path):
    """In another container, in parts, and merged: appending looks for the tars by these names."""
    spec = make_spec(samples=10, view_count=2, grid=(3, 2))
    with LabelSetWriter(tmp_path / "set", spec, [4, 6]) as writer:
        for index, name in enumerate(("a.tar", "b.tar")):
            first, last = writer.shard_range(index)
            arrays = make_arrays(spec, first, last)
            writer.write_encoded(index, encode_shard(arrays, spec), images=name)
        writer.finish()
    base = open_label_set(tmp_path / "set")

    def tars(place):
        return [shard.images for shard in open_label_set(tmp_path / place).shards]

    assert tars("set") == ["a.tar", "b.tar"]
    convert(base, tmp_path / "same", container=container)
    convert(base, tmp_path / "parts", views_per_part=1)
    convert(base, tmp_path / "cut", shards=3)
    assert tars("same") == ["a.tar", "b.tar"] and tars("parts") == ["a.tar", "b.tar"] * 2 and tars("cut") == [None] * 3


def test_the_card_of_a_set_that_grew_names_the_files_that_are_there(tmp_path):
    """Shards that were appended have another total in their names."""
    write_set(tmp_path / "set", make_spec(container="webdataset", samples=10), 2)
    manifest = open_label_set(tmp_path / "set").manifest
    assert "labels-{00000..00001}-of-00002.tar" in make_card(manifest).decode()
    added = dataclasses.replace(manifest.shards[1], name="labels-00002-of-00003.tar", first=10, samples=4)
    spec = dataclasses.replace(manifest.spec, source=manifest.spec.source | {"samples": 14})
    grown = Manifest(spec, (*manifest.shards, added))
    assert "labels-{00000..00001}-of-00002.tar::labels-00002-of-00003.tar" in make_card(grown).decode()


def test_views_of_different_images_are_no_family(family, tmp_path):
    """Of one set only some shards were pulled: its views of the other images would be zeros."""
    _, (first, second, third) = family
    pull(second, tmp_path / "some", shards="0-1")
    some = open_label_set(tmp_path / "some")
    assert in_view_order([second, first, third]) == [first, second, third]
    with pytest.raises(InputError, match="views0 and .*some hold views of different images, since only some shards"):
        in_view_order([first, some, third])
