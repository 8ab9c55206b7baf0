"""The compact encoding: its bounds on any labels, and arrays that contradict each other."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.format import containers
from stl_offline.labels.format.q8 import from_q8, to_q8
from stl_offline.labels.spec import ENCODINGS
from tests.labels.synthetic import make_arrays, make_spec

BOUNDS = ENCODINGS["q8"]


def make_labels(spec, seed, temperature):
    """Labels in float32 from full softmaxes, from nearly uniform to nearly one-hot."""
    draw = np.random.default_rng(seed)
    shape = (spec.num_samples, *spec.map_shape[:-1])
    full = draw.normal(draw.uniform(-50, 50), temperature, (*shape, spec.num_classes)).astype(np.float32)
    ids = np.argsort(-full, axis=-1, kind="stable")[..., : spec.top_k]
    logits = np.take_along_axis(full, ids, -1)
    confidence = 1 / np.exp(full.astype(np.float64) - full.max(-1, keepdims=True)).sum(-1)
    return dataclasses.replace(
        make_arrays(spec),
        class_ids=ids.astype(spec.id_dtype),
        logits=logits,
        confidence=confidence.astype(np.float32),
    )


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1e-3, 0.3, 2, 8, 60, 1000]),
    st.sampled_from([(1, 1), (2, 2), (7, 4), (300, 5), (1000, 20)]),
)
@example(seed=0, temperature=1e6, classes_k=(50, 50))
def test_bounds(seed, temperature, classes_k):
    classes, k = classes_k
    spec = make_spec(samples=3, classes=classes, top_k=k, grid=(4, 3), encoding="q8")
    labels = make_labels(spec, seed, temperature)
    stored = to_q8(labels.check(spec), spec)
    found = dataclasses.replace(labels, **from_q8(stored, spec)).check(spec)
    np.testing.assert_array_equal(found.class_ids, labels.class_ids)
    assert (found.logits.dtype, found.confidence.dtype) == (np.float16, np.float16)
    ratio = found.confidence.astype(np.float64) / labels.confidence
    assert abs(ratio - 1).max() <= BOUNDS["confidence_relative"]
    true = probabilities(labels.logits, labels.confidence).astype(np.float64)
    error = abs(probabilities(found.logits, found.confidence) - true)
    within = np.maximum(BOUNDS["probability_relative"] * true, BOUNDS["probability_absolute"])
    assert (error <= within).all()


@settings(max_examples=10)
@given(st.integers(0, 1000))
def test_what_was_compact_once_stays_the_same(seed):
    """Encoding decoded labels again, or storing them as float16, loses nothing more."""
    spec = make_spec(samples=4, classes=300, encoding="q8")
    plain = dataclasses.replace(spec, encoding="f16")
    once = containers.decode_shard(containers.encode_shard(make_labels(spec, seed, 3), spec), spec)
    assert containers.decode_shard(containers.encode_shard(once, plain), plain).equals(once)
    assert containers.decode_shard(containers.encode_shard(once, spec), spec).equals(once)


def test_an_image_names_each_class_once():
    spec = make_spec(samples=2, classes=500, top_k=2, grid=(1, 3), encoding="q8")
    labels = make_arrays(spec)
    labels.class_ids[0, 0, 0] = [[7, 400], [400, 3], [400, 9]]
    labels.class_ids[1, 0, 0] = [[5, 6], [6, 5], [5, 6]]
    stored = to_q8(labels, spec)
    # 400 is there three times, the others once: first it, then they by id; then the second image's list.
    assert np.cumsum(stored["palette"][:4], dtype=np.uint16).tolist() == [400, 3, 7, 9]
    assert np.cumsum(stored["palette"][4:], dtype=np.uint16).tolist() == [5, 6]
    assert stored["class_ranks"][0, 0, 0].tolist() == [[2, 0], [0, 1], [0, 3]]


def test_ids_over_65535():
    spec = make_spec(samples=2, classes=70_000, top_k=3, encoding="q8")
    labels = make_arrays(spec)
    labels.class_ids[..., 0] = 69_999
    labels.class_ids[..., 1] = 3
    labels.class_ids[..., 2] = 65_540
    data = containers.encode_shard(labels, spec)
    np.testing.assert_array_equal(containers.decode_shard(data, spec).class_ids, labels.class_ids)


def stored_example():
    spec = make_spec(samples=2, classes=30, encoding="q8")
    return spec, to_q8(make_arrays(spec), spec)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("palette", lambda a: a[:-1], "not in the palette"),
        ("palette", lambda a: a[:0], "not in the palette"),
        ("palette", lambda a: np.r_[a, a[:1]], "more classes than the images name"),
        ("class_ranks", lambda a: np.full_like(a, 65_535), "not in the palette"),
        ("logit_gaps", lambda a: np.full_like(a, 200), "more than 255"),
    ],
)
def test_arrays_that_contradict_each_other(name, change, words):
    spec, stored = stored_example()
    stored[name] = change(stored[name])
    with pytest.raises(FormatError, match=words):
        from_q8(stored, spec)


def test_confidence_of_any_number_of_steps_is_checked():
    spec, stored = stored_example()
    stored["confidence_steps"] = np.full_like(stored["confidence_steps"], 65_535)
    maps = from_q8(stored, spec)
    arrays = make_arrays(spec)
    with pytest.raises(FormatError, match="confidence"):
        ShardArrays(arrays.keys, arrays.content_hash, arrays.class_id, arrays.views, **maps).check(spec)
