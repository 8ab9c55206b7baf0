"""Every rule for the content of a shard, against every way of reading labels: refused, with the same words.

The shards are stored without any check and have right checksums, so each reader has to look for itself.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stl_offline.config import PreviewConfig
from stl_offline.errors import FormatError, InputError
from stl_offline.labels import rules
from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.convert import convert
from stl_offline.labels.format import containers, q8, tar_shard, zarr_shard
from stl_offline.labels.keys import hash_keys
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.merge import merge
from stl_offline.labels.stats import measure
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.reports.preview import preview_labels
from tests.labels.synthetic import make_arrays, make_spec

SAMPLES = 4


def spec_of(container: str, encoding: str):
    return make_spec(samples=SAMPLES, container=container, encoding=encoding, grid=(2, 3))


def change(name, place, value):
    def damage(arrays):
        found = getattr(arrays, name)
        found = list(found) if name == "keys" else found.copy()
        found[place] = value
        return found

    return name, damage


def sums_to_five(arrays):
    """Four equal logits, and a best class that is sure."""
    arrays.logits[2, 0, 1, 1] = 0
    found = arrays.confidence.copy()
    found[2, 0, 1, 1] = 1
    return found


# What is damaged (in sample 2, in the last cell but one of its map), and the words of the refusal.
RULES = {
    "class id": (*change("class_ids", (2, 0, 1, 1, 1), 7), "a class id is not below the class count"),
    "class twice": (*change("class_ids", (2, 0, 1, 1), 3), "a cell names a class twice"),
    "sum": ("confidence", sums_to_five, "the probabilities of a cell sum to more than 1"),
    "logit NaN": (*change("logits", (2, 0, 1, 1, 3), np.nan), "a logit is not finite"),
    "logit infinite": (*change("logits", (2, 0, 1, 1, 3), -np.inf), "a logit is not finite"),
    "logits rise": (*change("logits", (2, 0, 1, 1, 3), 100), "the logits of a cell do not fall"),
    "confidence 0": (*change("confidence", (2, 0, 1, 1), 0), "a confidence is not within (0, 1]"),
    "confidence above 1": (*change("confidence", (2, 0, 1, 1), 1.001), "a confidence is not within (0, 1]"),
    "confidence NaN": (*change("confidence", (2, 0, 1, 1), np.nan), "a confidence is not within (0, 1]"),
    "confidence negative": (*change("confidence", (2, 0, 1, 1), -0.5), "a confidence is not within (0, 1]"),
    "view NaN": (*change("views", (2, 0, 5), np.nan), "is not finite, is beyond ±10,000 or has no inverse"),
    "view infinite": (*change("views", (2, 0, 0), np.inf), "is not finite, is beyond ±10,000 or has no inverse"),
    "view 1e38": (*change("views", (2, 0), 1e38), "is not finite, is beyond ±10,000 or has no inverse"),
    "view 10,001": (*change("views", (2, 0, 2), -10_001), "is not finite, is beyond ±10,000 or has no inverse"),
    "view flat": (*change("views", (2, 0, 4), 0), "is not finite, is beyond ±10,000 or has no inverse"),
    "view not whole": (*change("views", (2, 0, 2), 0.25), "is not the whole image, which the manifest names"),
    "class of the image": (*change("class_id", 2, 7), "class_id 7 is not below the 7 classes"),
    "key empty": (*change("keys", 2, ""), "'' is no key"),
    "key absolute": (*change("keys", 2, "/etc/passwd"), "'/etc/passwd' is no key"),
    "key leads out": (*change("keys", 2, "a/../../b"), "'a/../../b' is no key"),
    "key control": (*change("keys", 2, "a\x1b[2Jb"), r"'a\x1b[2Jb' is no key"),
    "key line": (*change("keys", 2, "a\nb"), r"'a\nb' is no key"),
    "key C1": (*change("keys", 2, "a\x9bb"), r"'a\x9bb' is no key"),
    "key twice": (*change("keys", 2, "folder 0/größe 00000.JPEG"), "the key folder 0/größe 00000.JPEG is there twice"),
}
# What q8 cannot hold: its gaps fall and are finite, and each of its confidences is a finite number of steps.
F16_ONLY = {"logit NaN", "logit infinite", "logits rise", "confidence above 1", "confidence NaN", "confidence negative"}
FORMS = [(container, encoding) for container in ("zarr", "webdataset") for encoding in ("f16", "q8")]


class Stored(SimpleNamespace):
    """Arrays that nobody has looked at, with what an encoder asks of a `ShardArrays`."""

    def __len__(self):
        return len(self.keys)


def encode_unchecked(arrays: Stored, spec) -> bytes:
    stored = {"keys": np.array(arrays.keys, dtype=np.dtypes.StringDType())}
    stored |= {name: getattr(arrays, name) for name in ("content_hash", "class_id", "views")}
    if spec.encoding == "f16":
        stored |= {name: getattr(arrays, name) for name in ("class_ids", "logits", "confidence")}
    else:
        # One class more than there are, so that an id out of range finds its place in a palette.
        confidence = np.maximum(arrays.confidence, np.float16(6e-8))
        wider = dataclasses.replace(spec, class_names=(*spec.class_names, "one more"))
        with np.errstate(all="ignore"):
            stored |= q8.to_q8(Stored(**{**vars(arrays), "confidence": confidence}), wider)
        stored["confidence_steps"][arrays.confidence == 0] = 60_000  # exp(-528) is 0 as a float16
    module = {"zarr": zarr_shard, "webdataset": tar_shard}[spec.container]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "to_stored", lambda arrays, spec: stored)
        return module.encode(arrays, spec)


def write_damaged(path, spec, rule):
    name, damage, _ = RULES[rule]
    arrays = Stored(**{field.name: getattr(make_arrays(spec), field.name) for field in dataclasses.fields(ShardArrays)})
    setattr(arrays, name, damage(arrays))
    with LabelSetWriter(path, spec, 1) as writer:
        writer.write_encoded(0, encode_unchecked(arrays, spec))
        writer.finish()
    return open_label_set(path)


def read_verify(labels, out):
    faults = verify(labels, workers=1).faults
    if faults:
        raise FormatError(faults[0])


def read_cache(labels, out):
    arrays = make_arrays(labels.spec)
    build_token_cache(labels, arrays.keys[:1], arrays.content_hash[:1], labels.spec.class_names, folder=out)


def read_merged(labels, out):
    """With a sound set of other images."""
    spec = labels.spec
    with LabelSetWriter(out / "other", spec, 1) as writer:
        arrays = make_arrays(spec, SAMPLES, 2 * SAMPLES)
        writer.write_shard(0, arrays)
        writer.finish()
    merge([labels, open_label_set(out / "other")], out / "merged", workers=1)


def read_preview(labels, out):
    preview_labels(PreviewConfig(path=labels.place, out=str(out / "page"), samples=1, all_shards=True), None)


READERS = {
    "verify": read_verify,
    "cache": read_cache,
    "key": lambda labels, out: labels["folder 0/größe 00000.JPEG"],
    "values": lambda labels, out: list(labels.values()),
    "shard": lambda labels, out: labels.read_shard(0),
    "convert": lambda labels, out: convert(labels, out / "converted", encoding="f16", shards=2, workers=1),
    "copy": lambda labels, out: convert(labels, out / "copied", workers=1),
    "merge": read_merged,
    "stats": lambda labels, out: measure(labels, workers=1),
    "preview": read_preview,
}


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("rule", RULES)
def test_every_reader_refuses_with_the_same_words(tmp_path, rule, form):
    if form[1] == "q8" and rule in F16_ONLY:
        pytest.skip("q8 cannot hold it")
    labels = write_damaged(tmp_path / "set", spec_of(*form), rule)
    for name, read in READERS.items():
        (tmp_path / name).mkdir()
        with pytest.raises(FormatError) as refusal:
            read(open_label_set(labels.place), tmp_path / name)
        assert RULES[rule][2] in str(refusal.value) and "labels-00000-of-00001" in str(refusal.value), name


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_the_unchecked_encoder_changes_nothing_else(tmp_path, form):
    """The oracle of the test above: without damage, all readers take what it writes."""
    spec = spec_of(*form)
    whole = make_arrays(spec)
    stored = encode_unchecked(Stored(**{name: getattr(whole, name) for name in vars(whole)}), spec)
    assert stored == containers.encode_shard(whole, spec)
    with LabelSetWriter(tmp_path / "set", spec, 1) as writer:
        writer.write_encoded(0, stored)
        writer.finish()
    for name, read in READERS.items():
        (tmp_path / name).mkdir()
        read(open_label_set(tmp_path / "set"), tmp_path / name)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_holds_for_writers(rule):
    """Labels in memory, before they are encoded: float32 as a labeler gives them, and float16."""
    for dtype in ("<f2", "<f4"):
        spec = spec_of("zarr", "f16")
        whole = make_arrays(spec, dtype=dtype)
        name, damage, words = RULES[rule]
        with pytest.raises(FormatError) as refusal:
            containers.encode_shard(dataclasses.replace(whole, **{name: damage(whole)}), spec)
        assert words in str(refusal.value)


@pytest.mark.parametrize("key", ["a\ud800b", "\udcff.JPEG"])
def test_halves_of_surrogate_pairs_are_refused_wherever_keys_are_encoded(tmp_path, key):
    """JSON and file names that are not UTF-8 hold them; UTF-8 does not, so no shard can."""
    spec = spec_of("zarr", "f16")
    arrays = make_arrays(spec)
    with pytest.raises(FormatError, match="is no key"):
        dataclasses.replace(arrays, keys=[key, *arrays.keys[1:]])
    with pytest.raises(InputError, match="half of a surrogate pair"):
        hash_keys([key])
    with LabelSetWriter(tmp_path / "set", spec, 1) as writer:
        writer.write_shard(0, arrays)
        writer.finish()
    with pytest.raises(InputError, match="half of a surrogate pair"):
        build_token_cache(
            open_label_set(tmp_path / "set"),
            [key],
            arrays.content_hash[:1],
            spec.class_names,
            folder=tmp_path / "tokens",
        )


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@given(
    shift=st.floats(-200, 200),
    scale=st.sampled_from([0.0, 0.01, 1.0, 8.0, 60.0]),
    classes=st.integers(4, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_labels_of_a_softmax_are_refused(encoding, shift, scale, classes, seed):
    """What any classifier gives stays below the limit of the sum, whatever the encodings round: both in turn, too."""
    spec = make_spec(samples=1, classes=classes, grid=(4, 5), encoding=encoding)
    draw = np.random.default_rng(seed)
    full = (shift + scale * draw.normal(size=(1, 1, 4, 5, classes))).astype(np.float32)
    softmax = np.exp(full.astype(np.float64) - full.max(-1, keepdims=True))
    softmax /= softmax.sum(-1, keepdims=True)
    ids = np.argsort(-full, axis=-1, kind="stable")[..., :4]
    arrays = dataclasses.replace(
        make_arrays(spec, 0, 1, dtype="<f4"),
        class_ids=ids.astype("<u2"),
        logits=np.take_along_axis(full, ids, -1),
        confidence=softmax.max(-1).astype(np.float32),
    )
    once = containers.decode_shard(containers.encode_shard(arrays, spec), spec)
    if encoding == "f16":
        bounds = spec.bounds | make_spec(encoding="q8").bounds
        again = dataclasses.replace(spec, encoding="q8", bounds=bounds)
        containers.decode_shard(containers.encode_shard(once, again), again)


def test_bounds_of_another_encoding_do_not_make_labels_unreadable():
    """What is written can be read, whatever bounds a spec was given."""
    spec = make_spec(samples=40, grid=(6, 7), encoding="q8", bounds=make_spec(encoding="f16").bounds)
    containers.decode_shard(containers.encode_shard(make_arrays(spec, dtype="<f4"), spec), spec)


@pytest.mark.parametrize("encoding", ["f16", "q8"])
def test_large_class_logits_can_be_read(encoding):
    """The class head's logits are float16 in both encodings, whose steps between 64 and 128 are 0.06."""
    spec = make_spec(samples=3, encoding=encoding, class_top_k=2)
    arrays = make_arrays(spec, dtype="<f4")
    head = np.broadcast_to(np.float32([90.03, 89.97]), arrays.head_logits.shape)
    confidence = np.full(arrays.head_confidence.shape, 1 / (1 + np.exp(-0.06)), np.float32)
    arrays = dataclasses.replace(arrays, head_logits=head.copy(), head_confidence=confidence)
    found = containers.decode_shard(containers.encode_shard(arrays, spec), spec)
    np.testing.assert_allclose(found.head_logits.astype(float), head, rtol=2**-11)
    wrong = dataclasses.replace(arrays, head_confidence=1.2 * confidence)
    with pytest.raises(FormatError, match="sum to more than 1"):
        wrong.check(spec)


def test_the_limit_of_the_sum():
    """Just below it and just above it, of each kind of set, as the formula in the docstring gives it."""
    logits = np.array([40.0, 39.5, 39.0, 38.5], dtype=np.float32)
    share = probabilities(logits, np.float32(1)).sum(dtype=np.float64)
    for encoding in ("f16", "q8"):
        spec = make_spec(samples=1, grid=(1, 1), encoding=encoding)
        limit = (
            (1 + 2**-11 + rules._SLACK) * np.exp(2**-11 * (40 + 38.5))
            if encoding == "f16"
            else 1 + 0.005 + 0.02 + rules._SLACK + 4 * 1e-4
        )
        for factor, refused in ((0.9999, False), (1.0001, True)):
            arrays = dataclasses.replace(
                make_arrays(spec, 0, 1, dtype="<f4"),
                logits=logits.reshape(1, 1, 1, 1, 4),
                confidence=np.full((1, 1, 1, 1), factor * limit / share, dtype=np.float32),
            )
            if refused:
                with pytest.raises(FormatError, match="sum to more than 1"):
                    arrays.check(spec)
            else:
                arrays.check(spec)


def test_keys_that_are_odd_and_allowed():
    rules.check_keys(["größe", "..a/b..", "a..b", "a b", " ", "a\u00a0b", "\u202ea", "日本/語.JPEG", "a//b", "a\\b"])
