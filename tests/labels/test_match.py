"""Joining by key, stem or content: against plain dictionaries, and what each refuses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.errors import InputError, JoinError
from stl_offline.labels import keys as keys_module
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.join import join
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.match import stem
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SPEC = make_spec(samples=20)
HASHES = make_arrays(SPEC).content_hash
KEYS = [make_key(position) for position in range(20)]
TAR_KEYS = [f"other/{number // 5}/{key.rpartition('/')[2].partition('.')[0]}" for number, key in enumerate(KEYS)]


@pytest.fixture(scope="module")
def label_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_set(path, SPEC, 3)
    return open_label_set(path)


def write(path, keys, hashes):
    """A label set with these keys and content hashes, in two shards."""
    spec = make_spec(samples=len(keys))
    with LabelSetWriter(path, spec, 2) as writer:
        for index in range(2):
            first, last = writer.shard_range(index)
            arrays = make_arrays(spec, first, last)
            arrays.keys[:] = keys[first:last]
            arrays.content_hash[:] = hashes[first:last]
            writer.write_shard(index, arrays)
        writer.finish()
    return open_label_set(path)


def positions(labels, report):
    """The number of each image's label in the whole set, −1 for none."""
    return [
        labels.shards[shard].first + row if shard >= 0 else -1
        for shard, row in zip(report.shard.tolist(), report.row.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("n01/x.JPEG", "x"),
        ("train/n01/x", "x"),
        ("x.v2.jpg", "x"),
        ("a.b/x.jpg", "x"),
        ("x", "x"),
        (".hidden.jpg", ".hidden"),
        ("a/é.png", "é"),
    ],
)
def test_stems(key, expected):
    assert stem(key) == expected


@pytest.mark.parametrize("match", ["stem", "content"])
@given(chosen=st.lists(st.integers(0, 19), unique=True, min_size=1))
def test_any_subset_in_any_order(label_set, match, chosen):
    report = join(label_set, [TAR_KEYS[p] for p in chosen], HASHES[chosen], SPEC.class_names, match=match)
    assert positions(label_set, report) == chosen
    assert (report.matched, report.missing, report.changed, report.extra) == (len(chosen), 0, 0, 20 - len(chosen))


@settings(max_examples=25)
@given(
    images=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    labels=st.lists(st.integers(0, 6), min_size=2, max_size=9),
)
def test_contents_that_occur_several_times(tmp_path_factory, images, labels):
    """Every image of a content has the first label of this content."""
    contents = HASHES[:7]
    found = write(tmp_path_factory.mktemp("doubled"), KEYS[: len(labels)], contents[labels])
    keys = [f"{number}.png" for number in range(len(images))]
    expected = [labels.index(image) if image in labels else -1 for image in images]
    if all(place < 0 for place in expected):
        with pytest.raises(JoinError, match="no image has a label"):
            join(found, keys, contents[images], SPEC.class_names, match="content", missing="skip")
        return
    report = join(found, keys, contents[images], SPEC.class_names, match="content", missing="skip")
    assert positions(found, report) == expected
    assert report.extra == sum(label not in images for label in labels)


def test_changed_images_are_found_by_stem_and_refused(label_set):
    hashes = HASHES.copy()
    hashes[[3, 8]] += np.uint64(1)
    with pytest.raises(JoinError, match=rf"2 images changed .*\({TAR_KEYS[3]}, {TAR_KEYS[8]}\)"):
        join(label_set, TAR_KEYS, hashes, SPEC.class_names, match="stem")
    report = join(label_set, TAR_KEYS, hashes, SPEC.class_names, match="stem", allow_changed=True)
    assert (report.matched, report.changed) == (20, 2)
    with pytest.raises(JoinError, match="18 of 20 images have labels; 2 images without labels"):
        join(label_set, TAR_KEYS, hashes, SPEC.class_names, match="content")


def test_stems_that_are_not_unique_are_refused(label_set, tmp_path):
    keys = [*TAR_KEYS, f"else/{stem(TAR_KEYS[4])}.webp"]
    hashes = np.r_[HASHES, HASHES[4:5]]
    with pytest.raises(InputError, match=rf'images {TAR_KEYS[4]} and {keys[-1]} have the same stem.*`match="content"`'):
        join(label_set, keys, hashes, SPEC.class_names, match="stem")
    assert join(label_set, keys, hashes, SPEC.class_names, match="content").matched == 21
    doubled = write(tmp_path, ["a/x.png", "b/x.png", "c/y.png"], HASHES[:3])
    with pytest.raises(JoinError, match='holds the stem x twice; use `match="key"` or `match="content"`'):
        join(doubled, ["x"], HASHES[:1], SPEC.class_names, match="stem")
    # Where no image asks for it, nothing is ambiguous.
    assert join(doubled, ["y"], HASHES[2:3], SPEC.class_names, match="stem").matched == 1


@pytest.mark.parametrize("distinct", [1, 3])
def test_stems_whose_hashes_collide_are_told_apart(label_set, monkeypatch, distinct):
    real = keys_module.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(keys_module.xxhash, "xxh3_64_intdigest", lambda data: real(data) % distinct)
    report = join(label_set, TAR_KEYS, HASHES, SPEC.class_names, match="stem")
    assert positions(label_set, report) == list(range(20))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"match": "name"}, "`match` must be one of key, stem, content; got 'name'"),
        ({"match": "content", "allow_changed": True}, "`allow_changed` does nothing"),
    ],
)
def test_what_does_not_go_together(label_set, tmp_path, options, message):
    for function in (join, build_token_cache):
        with pytest.raises(InputError, match=message):
            function(label_set, TAR_KEYS, HASHES, SPEC.class_names, **options)


# What a failed join offers does what is promised.


def refusal(labels, keys, hashes, **options):
    with pytest.raises(JoinError) as caught:
        join(labels, keys, hashes, SPEC.class_names, **options)
    return str(caught.value)


def test_the_same_files_under_other_keys(label_set):
    text = refusal(label_set, TAR_KEYS, HASHES)
    assert '20 of 20 images match by content: `match="content"` joins them. no image has a label' in text
    for contradiction in ("converted", "check the data set", "`missing", "`allow_changed", "stem"):
        assert contradiction not in text


def test_the_same_keys_with_exchanged_contents(label_set):
    text = refusal(label_set, KEYS, HASHES[::-1])
    assert '20 of 20 images match by content: `match="content"` joins them' in text
    report = join(label_set, KEYS, HASHES[::-1], SPEC.class_names, match="content")
    assert positions(label_set, report) == list(range(19, -1, -1))


def test_some_images_were_renamed(label_set):
    keys = [*KEYS[:17], "a.png", "b.png", "c.png"]
    text = refusal(label_set, keys, HASHES)
    assert '20 of 20 images match by content: `match="content"`' in text and '`missing="skip"` leaves' in text
    assert join(label_set, keys, HASHES, SPEC.class_names, match="content").matched == 20


def test_content_is_not_offered_where_it_joins_no_more(label_set):
    hashes = HASHES.copy()
    hashes[:15] += np.uint64(1)
    text = refusal(label_set, KEYS, hashes)
    assert "content" not in text.replace("`allow_changed=True`", "") and "`allow_changed=True`" in text


def test_stems_are_not_offered_where_they_are_ambiguous(label_set):
    keys = [f"{folder}/{stem(KEYS[0])}.webp" for folder in "ab"]
    assert "stem" not in refusal(label_set, keys, HASHES[:2] + np.uint64(7))


def test_by_content_the_key_is_offered_where_images_were_compressed_anew(label_set):
    text = refusal(label_set, KEYS, HASHES + np.uint64(1), match="content")
    assert '20 of them have the key of a label of another content: `match="key"`' in text


def test_a_cache_of_another_match_is_not_taken(label_set, tmp_path):
    """The same keys and contents, but each image's content is another image's."""
    exchanged = HASHES[::-1]
    options = {"folder": tmp_path, "missing": "skip"}
    by_content = build_token_cache(label_set, KEYS, exchanged, SPEC.class_names, match="content", **options)
    by_key = build_token_cache(label_set, KEYS, exchanged, SPEC.class_names, allow_changed=True, **options)
    assert by_content.path != by_key.path
    for number in range(20):
        np.testing.assert_array_equal(by_key.class_ids[number], label_set[KEYS[number]].class_ids)
        np.testing.assert_array_equal(by_content.class_ids[number], label_set[KEYS[19 - number]].class_ids)
