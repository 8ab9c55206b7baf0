"""A shard's content: what no label shard can hold is refused; the one definition of its probabilities."""

import dataclasses

import numpy as np
import pytest

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import probabilities
from tests.labels.synthetic import make_arrays, make_spec

SPEC = make_spec(samples=5, classes=7, grid=(3, 5), top_k=4)


def changed(name, index, value):
    arrays = make_arrays(SPEC)
    array = getattr(arrays, name)
    if isinstance(array, list):
        array[index] = value
        return dataclasses.replace(arrays, keys=array)
    array = array.copy()
    array[index] = value
    return dataclasses.replace(arrays, **{name: array})


def test_good_arrays_pass():
    arrays = make_arrays(SPEC)
    assert arrays.check(SPEC) is arrays
    assert len(arrays) == 5
    assert arrays.equals(make_arrays(SPEC)) and not arrays.equals(make_arrays(SPEC, seed=1))


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("content_hash", np.zeros(4, "<u8"), "content_hash must be"),
        ("content_hash", np.zeros(5, "<i8"), "content_hash must be"),
        ("class_id", np.full(5, -1), "class_id must lie"),
        ("views", np.zeros((5, 1, 2, 3), "<f4"), "views must be"),
        ("class_ids", np.zeros((5, 3, 5, 4), "<u2"), "class_ids must be"),
        ("class_ids", np.zeros((5, 1, 3, 5, 4), "<f2"), "class_ids must be"),
        ("logits", np.zeros((5, 1, 5, 3, 4), "<f2"), "logits must be"),
        ("logits", np.zeros((5, 1, 3, 5, 4), ">f2"), "logits must be"),
        ("confidence", np.zeros((5, 1, 3, 5, 1), "<f2"), "confidence must be"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(name, array, words):
    with pytest.raises(FormatError, match=words):
        dataclasses.replace(make_arrays(SPEC), **{name: array})


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a/../../b", "..", "a\0b"])
def test_keys_that_are_no_path_below_a_root_are_refused(key):
    with pytest.raises(FormatError, match="no key"):
        changed("keys", 2, key)


def test_a_key_that_is_there_twice_is_named():
    with pytest.raises(FormatError, match="twin.png is there twice"):
        dataclasses.replace(make_arrays(SPEC), keys=["twin.png", "b", "c", "twin.png", "d"])


@pytest.mark.parametrize(
    ("name", "index", "value", "words"),
    [
        ("class_ids", (3, 0, 2, 4, 1), 7, "00003.JPEG.*not below the class count"),
        ("class_ids", (3, 0, 2, 4), 2, "names a class twice"),
        ("logits", (1, 0, 0, 0, 0), np.inf, "00001.JPEG.*not finite"),
        ("logits", (1, 0, 0, 0, 3), np.nan, "not finite"),
        ("logits", (4, 0, 1, 1, 3), 100, "do not fall"),
        ("confidence", (0, 0, 0, 0), 0, "confidence"),
        ("confidence", (0, 0, 2, 0), 1.25, "confidence"),
        ("confidence", (0, 0, 2, 0), np.nan, "confidence"),
        ("class_id", 2, 7, "class_id 7 is not below the 7 classes"),
        ("views", (2, 0, 0), 0, "view of .*00002.JPEG"),
        ("views", (2, 0, 5), np.nan, "view of .*00002.JPEG"),
    ],
)
def test_values_that_cannot_be_are_refused(name, index, value, words):
    with pytest.raises(FormatError, match=words):
        changed(name, index, value).check(SPEC)


def test_another_label_sets_arrays_are_refused():
    arrays = make_arrays(SPEC)
    with pytest.raises(FormatError, match=r"\(1, 5, 3, 4\)"):
        arrays.check(make_spec(samples=5, grid=(5, 3)))
    with pytest.raises(FormatError, match="class ids are uint16"):
        arrays.check(make_spec(samples=5, classes=70_000))


def test_a_shard_without_samples_is_refused():
    with pytest.raises(FormatError, match="at least one"):
        dataclasses.replace(make_arrays(SPEC), keys=[])


def test_probabilities_are_the_softmax_of_all_logits():
    draw = np.random.default_rng(0)
    full = draw.normal(0, 4, (6, 5, 30)).astype(np.float32)
    softmax = np.exp(full.astype(np.float64))
    softmax /= softmax.sum(-1, keepdims=True)
    top = np.argsort(-full, axis=-1)[..., :5]
    logits = np.take_along_axis(full, top, -1)
    expected = np.take_along_axis(softmax, top, -1)
    found = probabilities(logits, expected[..., 0].astype(np.float32))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=2e-6)
    assert found[..., 0].tobytes() == expected[..., 0].astype(np.float32).tobytes()


def test_probabilities_change_neither_argument():
    logits, confidence = np.array([[3.0, 1.0]], np.float32), np.array([0.5], np.float32)
    probabilities(logits, confidence)
    assert logits.tolist() == [[3, 1]] and confidence.tolist() == [0.5]
