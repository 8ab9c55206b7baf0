"""Other containers, encodings and shards of the same labels: nothing lost, the same bytes whichever way they came."""

import dataclasses

import numpy as np
import pytest

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.labels.arrays import probabilities
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS, ENCODINGS
from stl_offline.labels.transfer import pull
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.crash import files
from tests.labels.synthetic import make_arrays, make_spec, write_set

FORMS = [(container, encoding) for container in CONTAINERS for encoding in ENCODINGS]


def make_form(container, encoding, shards=4):
    """The spec of a job that writes this form at once."""
    creation = {"seed": 3, "format": container, "encoding": encoding, "shards": shards}
    return make_spec(samples=17, grid=(4, 6), view_count=2, container=container, encoding=encoding, creation=creation)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """The same labels in every form, each as a job writes it at once from what the labeler said."""
    folder = tmp_path_factory.mktemp("forms")
    for container, encoding in FORMS:
        write_set(folder / container / encoding, make_form(container, encoding), 4)
    return folder


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("shards", [None, 1, 3, 17])
def test_containers_and_shards_there_and_back_give_the_same_bytes(sets, tmp_path, encoding, shards):
    first = sets / "zarr" / encoding
    convert(open_label_set(first), tmp_path / "tar", container="webdataset", shards=shards)
    if shards is None:
        assert files(tmp_path / "tar") == files(sets / "webdataset" / encoding)
    convert(open_label_set(tmp_path / "tar"), tmp_path / "zip", container="zarr", shards=4)
    assert files(tmp_path / "zip") == files(first)


def test_to_q8_as_a_job_would_have_written_it_within_the_stated_bounds(sets, tmp_path):
    """The true probabilities are those of float16 here; a job's q8 starts from float32, which differs by float16's
    rounding and no more."""
    small = convert(open_label_set(sets / "zarr" / "f16"), tmp_path / "q8", encoding="q8")
    assert small.spec.bounds == {
        "probability_relative": 0.02,
        "probability_absolute": 1e-4,
        "confidence_relative": 0.005 + 2**-11,
        "logit_relative": 2**-11,
    }
    before, after = open_label_set(sets / "zarr" / "f16"), open_label_set(tmp_path / "q8")
    for index in range(4):
        old, new = before.read_shard(index), after.read_shard(index)
        assert new.keys == old.keys and new.class_ids.tobytes() == old.class_ids.tobytes()
        true, kept = (probabilities(each.logits, each.confidence) for each in (old, new))
        assert (np.abs(kept - true) <= np.maximum(0.02 * true, 1e-4)).all()
        np.testing.assert_allclose(new.confidence.astype("f4"), old.confidence.astype("f4"), rtol=0.005)


def test_from_q8_nothing_is_lost(sets, tmp_path):
    """What q8 says is said in f16, bit for bit; back in q8 it is the same file."""
    q8 = sets / "webdataset" / "q8"
    exact = convert(open_label_set(q8), tmp_path / "f16", encoding="f16", container="zarr")
    assert exact.spec.bounds == ENCODINGS["q8"]  # not those of f16: what q8 changed stays changed
    ours, theirs = open_label_set(tmp_path / "f16"), open_label_set(q8)
    assert all(ours.read_shard(index).equals(theirs.read_shard(index)) for index in range(4))
    convert(ours, tmp_path / "again", encoding="q8", container="webdataset")
    assert files(tmp_path / "again") == files(q8)


def test_the_same_form_is_a_copy(sets, tmp_path):
    convert(open_label_set(sets / "zarr" / "q8"), tmp_path / "copy")
    assert files(tmp_path / "copy") == files(sets / "zarr" / "q8")


def test_an_interrupted_conversion_goes_on(sets, tmp_path, monkeypatch):
    real, written = LabelSetWriter.write_encoded, []

    def write(self, *given):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(given[0])
        return real(self, *given)

    source = open_label_set(sets / "zarr" / "f16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LabelSetWriter, "write_encoded", write)
        convert(source, tmp_path / "tar", container="webdataset", workers=1)
    with pytest.raises(FormatError, match="not finished: 2 of 4 shards"):
        open_label_set(tmp_path / "tar")
    with pytest.raises(TargetError, match="other settings.*encoding"):
        convert(source, tmp_path / "tar", container="webdataset", encoding="q8")
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(LabelSetWriter, "write_encoded", write)
        convert(source, tmp_path / "tar", container="webdataset")
    assert len(written) == 2
    assert files(tmp_path / "tar") == files(sets / "webdataset" / "f16")


def test_many_threads_give_the_same_bytes(sets, tmp_path):
    """zarr's settings are one for all threads; what is written must not depend on who encodes beside."""
    for attempt in range(3):
        convert(open_label_set(sets / "webdataset" / "f16"), tmp_path / str(attempt), container="zarr", workers=4)
        assert files(tmp_path / str(attempt)) == files(sets / "zarr" / "f16")


def test_into_a_store(sets):
    convert(open_label_set(sets / "zarr" / "f16"), "memory://converted/labels", container="webdataset")
    there = open_label_set("memory://converted/labels")
    assert there.fingerprint == open_label_set(sets / "webdataset" / "f16").fingerprint


def test_what_cannot_be_converted(sets, tmp_path):
    source = open_label_set(sets / "zarr" / "f16")
    for settings, words in (
        ({"container": "hdf5"}, "unknown container 'hdf5'; known here: zarr, webdataset"),
        ({"encoding": "q4"}, "unknown encoding 'q4'; known here: f16, q8"),
        ({"shards": 0}, "between 1 and the 17 images, got 0"),
        ({"shards": 18}, "between 1 and the 17 images, got 18"),
    ):
        with pytest.raises(InputError, match=words):
            convert(source, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()
    pull(source, tmp_path / "some", shards="1")
    with pytest.raises(InputError, match="only some shards"):
        convert(open_label_set(tmp_path / "some"), tmp_path / "out", container="webdataset")
    (tmp_path / "some" / source.shards[1].name).write_bytes(b"")


def test_a_damaged_shard_stops_the_conversion(sets, tmp_path):
    pull(open_label_set(sets / "zarr" / "f16"), tmp_path / "damaged")
    damaged = open_label_set(tmp_path / "damaged")
    name = damaged.shards[2].name
    data = bytearray((tmp_path / "damaged" / name).read_bytes())
    data[100] ^= 1
    (tmp_path / "damaged" / name).write_bytes(data)
    with pytest.raises(FormatError, match=f"{name} is damaged"):
        convert(damaged, tmp_path / "out", container="webdataset")
    with pytest.raises(FormatError, match="is not finished"):
        open_label_set(tmp_path / "out")


def test_a_classes_ids_of_four_bytes(tmp_path):
    spec = make_spec(samples=3, classes=70_000, encoding="q8")
    write_set(tmp_path / "a", spec, 1)
    convert(open_label_set(tmp_path / "a"), tmp_path / "b", encoding="f16", container="webdataset")
    found, whole = open_label_set(tmp_path / "b").read_shard(0), make_arrays(spec)
    assert found.class_ids.dtype == np.uint32 and (found.class_ids == whole.class_ids).all()
    assert dataclasses.asdict(open_label_set(tmp_path / "b").spec)["encoding"] == "f16"
