"""Joining labels and images by key: each way in which they can differ, counted and named."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stl_offline.errors import InputError, JoinError
from stl_offline.labels import keys as keys_module
from stl_offline.labels.join import join
from stl_offline.labels.keys import rename_key, rename_keys
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set

SPEC = make_spec(samples=20)
HASHES = make_arrays(SPEC).content_hash
KEYS = [make_key(position) for position in range(20)]


@pytest.fixture(scope="module")
def label_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("labels")
    write_set(path, SPEC, 3)
    return open_label_set(path)


def places(label_set, report):
    return [
        label_set.shards[shard].first + row if shard >= 0 else -1
        for shard, row in zip(report.shard.tolist(), report.row.tolist(), strict=True)
    ]


@given(st.lists(st.integers(0, 19), unique=True, min_size=1))
def test_any_subset_in_any_order(label_set, positions):
    report = join(label_set, [KEYS[p] for p in positions], HASHES[positions], SPEC.class_names)
    assert places(label_set, report) == positions
    assert (report.matched, report.missing, report.changed) == (len(positions), 0, 0)
    assert report.extra == 20 - len(positions)
    assert f"{len(positions)} of {len(positions)} images have labels" in str(report)


def test_missing_keys(label_set):
    keys = [KEYS[4], "new/1.png", KEYS[2], "new/2.png"]
    hashes = np.array([HASHES[4], 1, HASHES[2], 2], dtype=np.uint64)
    with pytest.raises(JoinError, match=r"2 of 4 images.*2 images without labels \(new/1.png, new/2.png\).*skip"):
        join(label_set, keys, hashes, SPEC.class_names)
    report = join(label_set, keys, hashes, SPEC.class_names, missing="skip")
    assert places(label_set, report) == [4, -1, 2, -1]
    assert (report.matched, report.missing, report.missing_examples) == (2, 2, ["new/1.png", "new/2.png"])


def test_changed_images(label_set):
    hashes = HASHES.copy()
    hashes[[3, 8]] += np.uint64(1)
    with pytest.raises(JoinError, match=rf"2 images changed .*\({KEYS[3]}, {KEYS[8]}\).*`allow_changed=True`"):
        join(label_set, KEYS, hashes, SPEC.class_names)
    with pytest.raises(JoinError, match="`allow_changed=True`"):
        join(label_set, KEYS, hashes, SPEC.class_names, missing="skip")
    report = join(label_set, KEYS, hashes, SPEC.class_names, allow_changed=True)
    assert (report.matched, report.changed) == (20, 2)


def test_a_renamed_root_matches_nothing_and_says_so(label_set):
    keys = [f"train/{key}" for key in KEYS]
    for missing in ("error", "skip"):
        with pytest.raises(JoinError, match="0 of 20 images have labels.*no image has a label$") as caught:
            join(label_set, keys, HASHES, SPEC.class_names, missing=missing)
        # With no image left, skipping would be refused, too.
        assert "`missing" not in str(caught.value)


# Another team's images: what each case says.


def refusal(label_set, keys, hashes, **policy):
    with pytest.raises(JoinError) as caught:
        join(label_set, keys, hashes, SPEC.class_names, **policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_order(label_set):
    order = np.random.default_rng(1).permutation(20)
    report = join(label_set, [KEYS[place] for place in order], HASHES[order], SPEC.class_names)
    assert str(report) == "20 of 20 images have labels"


def test_a_subset(label_set):
    report = join(label_set, KEYS[5:9], HASHES[5:9], SPEC.class_names)
    assert str(report) == f"4 of 4 images have labels; 16 labels without an image ({', '.join(KEYS[:3])}, …)"


def test_extra_images(label_set):
    hashes = np.r_[HASHES, np.array([7], np.uint64)]
    text = refusal(label_set, [*KEYS, "new/cat.jpg"], hashes)
    assert '20 of 21 images have labels; 1 image without labels (new/cat.jpg). `missing="skip"`' in text


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda key: f"train/{key}", "train/="),
        (lambda key: f"data/imagenet/{key}", "data/imagenet/="),
    ],
)
def test_a_renamed_root(label_set, change, rule):
    keys = [change(key) for key in KEYS]
    for hashes in (HASHES, HASHES + np.uint64(1)):  # and compressed anew
        text = refusal(label_set, keys, hashes)
        assert "0 of 20 images have labels" in text
        assert f"`key_prefix={rule!r}` finds 20 of 20" in text
        assert ("also needs `allow_changed=True`" in text) == (hashes is not HASHES)
    assert '20 of 20 images match by content: `match="content"` joins them' in refusal(label_set, keys, HASHES)
    renamed = rename_keys(keys, rule)
    assert join(label_set, renamed, HASHES, SPEC.class_names).matched == 20


def test_a_root_that_only_the_labels_have(tmp_path):
    with LabelSetWriter(tmp_path, SPEC, 2) as writer:
        for index in range(2):
            arrays = make_arrays(SPEC, *writer.shard_range(index))
            arrays.keys[:] = [f"train/{key}" for key in arrays.keys]
            writer.write_shard(index, arrays)
        writer.finish()
    label_set = open_label_set(tmp_path)
    assert "they start with 'train/' in the labels only; `key_prefix='=train/'` finds 20 of 20" in refusal(
        label_set, KEYS, HASHES
    )
    text = refusal(label_set, [f"val/{key}" for key in KEYS], HASHES)
    assert (
        "they start with 'val/' in the images and 'train/' in the labels; `key_prefix='val/=train/'` finds 20 of 20"
        in text
    )


def test_recompressed_images(label_set):
    text = refusal(label_set, KEYS, HASHES + np.uint64(1))
    assert "20 of 20 images have labels; 20 images changed since they were labelled" in text
    assert "all of them differ, as after resizing or recompression; `allow_changed=True` uses the labels anyway" in text


def test_images_of_another_format(label_set):
    keys = [key.replace(".JPEG", ".webp") for key in KEYS]
    text = refusal(label_set, keys, HASHES + np.uint64(1))
    assert (
        f'keys differ by folders or file endings ({keys[0]} in the images, {KEYS[0]} in the labels): `match="stem"` '
        "finds 20 of 20 (the content of all of them differs: also needs `allow_changed=True`)"
    ) in text
    options = {"match": "stem", "allow_changed": True}
    assert join(label_set, keys, HASHES + np.uint64(1), SPEC.class_names, **options).matched == 20


def test_another_data_set(label_set):
    text = refusal(label_set, [f"{place}.png" for place in range(20)], HASHES + np.uint64(1))
    assert "no image has a label: check the data set" in text
    assert "keys differ" not in text and "content of labels" not in text


def test_a_prefix_that_would_give_two_images_one_key_is_not_offered(label_set):
    """As after a partial pull: the labels at hand are of other images, whose names are alike but for the folder."""
    keys = [*KEYS[:10], *(f"other/{key}" for key in KEYS[:10])]
    assert "key_prefix" not in refusal(label_set, keys, np.r_[HASHES[:10], HASHES[:10] + np.uint64(1)])


@pytest.mark.parametrize("text", ["train/", "a=b=c"])
def test_key_prefixes_that_are_none(text):
    with pytest.raises(InputError, match="a key prefix is OLD=NEW"):
        rename_keys(KEYS, text)


def test_keys_are_renamed():
    assert rename_keys(["a/b", "c/a/b", "a"], "a/=") == ["b", "c/a/b", "a"]
    assert rename_keys(["a/b", "x"], "=n/") == ["n/a/b", "n/x"]
    assert rename_keys(["a"], "") == ["a"]
    assert rename_keys(["a/b", "a/b"], "a/=") == ["b", "b"]
    with pytest.raises(InputError, match="gives two images one key: 'x' and 'train/x'"):
        rename_keys(["b", "x", "train/x"], "train/=")
    with pytest.raises(InputError, match="no image's key starts with the 'b/' of the key prefix b/=c/; .* like 'a/b'"):
        rename_keys(["a/b", "x"], "b/=c/")
    assert rename_key("a/b", "b/=c/") == "a/b" and rename_key("b/b", "b/=c/") == "c/b"


def test_many_are_counted_and_three_are_named(label_set):
    keys = [f"new/{position:02d}" for position in range(15)] + KEYS[:5]
    hashes = np.zeros(20, np.uint64)
    with pytest.raises(JoinError, match=r"15 images without labels \(new/00, new/01, new/02, …\)"):
        join(label_set, keys, hashes, SPEC.class_names)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            SPEC.class_names[::-1],
            "the order differs: class 0 is 'class 0' in the label set and 'class 6' in the images",
        ),
        ((*SPEC.class_names[:-1], "cat"), r"1 of the images' classes are not in it \(cat\)"),
        (SPEC.class_names[:-2], r"2 of its classes are not among the images' \(class 5, class 6\)"),
        ((*SPEC.class_names, "cat"), r"7 classes. and the images .8.*cat"),
        (
            tuple(map(str, range(7))),
            r"7 of the images' .*; pack the images with names for their numbers \(`pack\(class",
        ),
    ],
)
def test_another_class_list_is_refused(label_set, names, words):
    with pytest.raises(JoinError, match=words):
        join(label_set, KEYS, HASHES, names)


def test_keys_that_are_there_twice(label_set, tmp_path):
    with pytest.raises(InputError, match=f"the images hold the key {KEYS[1]} twice"):
        join(label_set, [KEYS[1], KEYS[2], KEYS[1]], HASHES[:3], SPEC.class_names)
    with LabelSetWriter(tmp_path, SPEC, 2) as writer:
        for index in range(2):
            writer.write_shard(index, make_arrays(SPEC, 0, 10))
        writer.finish()
    with pytest.raises(JoinError, match=f"holds the key {KEYS[0]} twice"):
        join(open_label_set(tmp_path), KEYS[:10], HASHES[:10], SPEC.class_names)


def test_arguments_that_do_not_fit(label_set):
    with pytest.raises(InputError, match="`missing` must be one of error, skip, got 'drop'"):
        join(label_set, KEYS, HASHES, SPEC.class_names, missing="drop")
    with pytest.raises(InputError, match="20 keys but 19 content hashes"):
        join(label_set, KEYS, HASHES[1:], SPEC.class_names)


@pytest.mark.parametrize("distinct", [1, 2, 5])
def test_keys_whose_hashes_collide_are_told_apart(label_set, monkeypatch, distinct):
    real = keys_module.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(keys_module.xxhash, "xxh3_64_intdigest", lambda data: real(data) % distinct)
    order = np.random.default_rng(0).permutation(20)
    keys = [KEYS[position] for position in order]
    assert places(label_set, join(label_set, keys, HASHES[order], SPEC.class_names)) == order.tolist()
    report = join(label_set, [*keys[:7], "new"], np.r_[HASHES[order[:7]], HASHES[:1]], SPEC.class_names, missing="skip")
    assert places(label_set, report) == [*order[:7].tolist(), -1]
    assert report.extra == 13
    with pytest.raises(InputError, match="twice"):
        join(label_set, [*keys, keys[3]], np.r_[HASHES[order], HASHES[:1]], SPEC.class_names)
