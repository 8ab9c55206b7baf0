"""Label sets without this package: plain zarr, plain webdataset, and a reader written from the format's description."""

import gc
import io
import re
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import webdataset
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from stl_offline.errors import FormatError
from stl_offline.labels.format import containers
from stl_offline.labels.format.tar_shard import member_names
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import ENCODINGS
from tests.labels import tar_reader
from tests.labels.synthetic import make_arrays, make_spec, write_set

every_encoding = pytest.mark.parametrize("encoding", ENCODINGS)


def read_with_webdataset(*paths, decode=True):
    """All samples of tars. webdataset leaves its files for the garbage collector to close; here it does so at once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        dataset = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False)
        samples = list(dataset.decode() if decode else dataset)
        gc.collect()
    return samples


def make_set(path, **settings):
    write_set(path, make_spec(samples=11, view_count=2, classes=300, **settings), 2)
    return open_label_set(path)


@every_encoding
def test_plain_zarr(tmp_path, encoding):
    labels = make_set(tmp_path, encoding=encoding)
    position = 0
    for shard in labels.shards:
        with zarr.storage.ZipStore(tmp_path / shard.name, mode="r") as store:
            group = zarr.open_group(store, mode="r")
            assert group.attrs["format"] == "stl-offline label set"
            keys = group["keys"][:]
            if encoding == "f16":
                class_ids, logits = group["class_ids"][:], group["logits"][:].astype(np.float32)
                confidence = group["confidence"][:]
            else:
                ranks = group["class_ranks"][:]
                bounds = np.cumsum([0, *(ranks.reshape(len(ranks), -1).max(1).astype(int) + 1)])
                palette = group["palette"][:]
                class_ids = np.stack(
                    [
                        np.cumsum(palette[first:last], dtype=palette.dtype)[sample]
                        for first, last, sample in zip(bounds[:-1], bounds[1:], ranks, strict=True)
                    ]
                )
                gaps = np.cumsum(group["logit_gaps"][:], axis=-1, dtype=np.int64)
                logits = np.concatenate([np.zeros_like(gaps[..., :1]), -gaps], axis=-1) * (5 / 128)
                confidence = np.exp(-0.0088 * group["confidence_steps"][:].astype(np.float64)).astype(np.float16)
            for row, key in enumerate(keys):
                expected = labels[str(key)]
                assert list(labels)[position] == key
                position += 1
                np.testing.assert_array_equal(class_ids[row], expected.class_ids)
                np.testing.assert_array_equal(logits[row], expected.logits)
                np.testing.assert_array_equal(confidence[row], expected.confidence)
                np.testing.assert_array_equal(group["views"][row], expected.views)
                assert group["class_id"][row] == expected.class_id
                assert group["content_hash"][row] == expected.content_hash
    assert position == 11


@every_encoding
def test_plain_webdataset(tmp_path, encoding):
    labels = make_set(tmp_path, encoding=encoding, container="webdataset")
    samples = read_with_webdataset(*(tmp_path / shard.name for shard in labels.shards))
    assert [sample["labels.npy.gz"]["key"].item().decode() for sample in samples] == list(labels)
    assert [sample["__key__"] for sample in samples] == [key.removesuffix(".JPEG") for key in list(labels)]
    for sample, key in zip(samples, list(labels), strict=True):
        record, expected = sample["labels.npy.gz"], labels[key]
        assert record["class_id"] == expected.class_id
        np.testing.assert_array_equal(record["views"], expected.views)
        if encoding == "f16":
            np.testing.assert_array_equal(record["class_ids"], expected.class_ids)
            np.testing.assert_array_equal(record["logits"], expected.logits)


def test_labels_join_images_in_webdataset(tmp_path):
    """Tars of labels and of images, read side by side, meet by key."""
    labels = make_set(tmp_path, container="webdataset")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        for key in list(labels):
            info = tarfile.TarInfo(key)
            archive.addfile(info)
    images = read_with_webdataset(tmp_path / "images.tar", decode=False)
    tars = read_with_webdataset(*(tmp_path / shard.name for shard in labels.shards))
    assert [sample["__key__"] for sample in images] == [sample["__key__"] for sample in tars]
    assert len(images) == 11


@every_encoding
def test_a_strangers_reader(tmp_path, encoding):
    labels = make_set(tmp_path, encoding=encoding, container="webdataset")
    samples = list(tar_reader.read_label_set(tmp_path))
    assert [sample["key"] for sample in samples] == list(labels)
    for sample in samples:
        expected = labels[sample["key"]]
        assert (sample["class_id"], sample["content_hash"]) == (expected.class_id, expected.content_hash)
        np.testing.assert_array_equal(sample["class_ids"], expected.class_ids)
        np.testing.assert_array_equal(sample["views"], expected.views)
        np.testing.assert_array_equal(sample["confidence"], expected.confidence)
        np.testing.assert_allclose(sample["probabilities"], expected.probabilities(), rtol=1e-6)


def test_the_strangers_reader_is_short_and_uses_nothing_of_ours(tmp_path):
    source = Path(tar_reader.__file__).read_text()
    assert len(source.splitlines()) <= 65
    assert "stl_offline" not in source
    make_set(tmp_path, container="webdataset")
    # In a Python that has loaded nothing but numpy and the standard library.
    code = (
        f"import sys; sys.path.insert(0, {str(Path(tar_reader.__file__).parent)!r}); import tar_reader;"
        f"print(len(list(tar_reader.read_label_set({str(tmp_path)!r}))),"
        "sorted({'zarr', 'webdataset', 'numcodecs', 'numba', 'stl_offline'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["11", "[]"]


# Names in a tar.

keys = st.from_regex(r"\A(?:[a-zé_. ]{1,4}/){0,2}[a-zé_.% ]{1,6}\Z").filter(
    lambda key: ".." not in key.split("/") and not key.startswith("/")
)


@settings(max_examples=8)
@given(st.lists(keys, unique=True, min_size=1, max_size=8))
def test_every_key_gives_a_name_that_webdataset_reads(tmp_path_factory, keys):
    spec = make_spec(samples=len(keys), container="webdataset")
    arrays = make_arrays(spec)
    arrays.keys[:] = keys
    file = tmp_path_factory.getbasetemp() / "names.tar"
    file.write_bytes(containers.encode_shard(arrays, spec))
    assert containers.decode_shard(file, spec).keys == keys
    samples = read_with_webdataset(file)
    assert [sample["labels.npy.gz"]["key"].item().decode() for sample in samples] == keys
    assert len({sample["__key__"] for sample in samples}) == len(keys)


def test_names():
    assert member_names(["n01/a.JPEG", "n01/b.c.png", "d.e/f"]) == ["n01/a", "n01/b", "d.e/f"]
    assert member_names(["x.jpg", "x.png", "x.gif"]) == ["x", "x%2Epng", "x%2Egif"]
    assert member_names(["x.jpg", "x%2Epng.jpg", "x.png"]) == ["x", "x%2Epng", "x%2Epng%2E"]
    assert member_names(["a/.hidden.jpg", "__meta__", "__a__/b.jpg"]) == [
        "a/%2Ehidden%2Ejpg",
        "%5F%5Fmeta__",
        "%5F%5Fa__/b%2Ejpg",
    ]


def test_long_names():
    spec = make_spec(samples=2, container="webdataset")
    arrays = make_arrays(spec)
    arrays.keys[:] = ["d" * 150 + "/" + "é" * 100 + ".jpg", "x" * 5000 + ".jpg"]
    assert containers.decode_shard(containers.encode_shard(arrays, spec), spec).equals(arrays)


def rename(data, change):
    """The shard with its members' headers changed."""
    stream = io.BytesIO()
    with (
        tarfile.open(fileobj=io.BytesIO(data)) as archive,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as copy,
    ):
        for index, member in enumerate(archive.getmembers()):
            content = archive.extractfile(member).read()
            change(index, member)
            copy.addfile(member, io.BytesIO(content) if member.isreg() else None)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "../../etc/cron.d/job.labels.npy.gz"}, "'../../etc/cron.d/job' is not named after its key"),
        ({"name": "/etc/passwd.labels.npy.gz"}, "not named after its key"),
        ({"name": "n01/other.labels.npy.gz"}, "not named after its key"),
        ({"name": "n01/other.labels.pkl"}, "no label: 'n01/other.labels.pkl'"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "no label"),
        ({"type": tarfile.DIRTYPE}, "no label"),
    ],
)
def test_hostile_members_are_refused_by_name(change, words):
    spec = make_spec(samples=4, container="webdataset")
    data = containers.encode_shard(make_arrays(spec), spec)

    def apply(index, member):
        if index == 2:
            for name, value in change.items():
                setattr(member, name, value)

    assert containers.decode_shard(rename(data, lambda index, member: None), spec).equals(make_arrays(spec))
    with pytest.raises(FormatError, match=re.escape(words)):
        containers.decode_shard(rename(data, apply), spec)


def test_a_hostile_key_is_refused():
    """The names agree with each other, but lead out of the folder."""
    spec = make_spec(samples=3, container="webdataset")
    arrays = make_arrays(spec)
    arrays.keys[1] = "../../etc/passwd"  # behind the back of the check that refuses it
    data = containers.encode_shard(arrays, spec)
    with pytest.raises(FormatError, match="'../../etc/passwd' is no key"):
        containers.decode_shard(data, spec)


def test_a_pickle_in_a_record_is_never_read():
    spec = make_spec(samples=1, container="webdataset")
    from stl_offline.labels.format import tar_shard

    stream = io.BytesIO()
    np.save(stream, np.array({"key": "value"}, dtype=object), allow_pickle=True)
    with pytest.raises(FormatError, match="without a key"):
        tar_shard._read_record(tar_shard._gzip(stream.getvalue()), tar_shard._fields({}), 10_000)
    assert spec.container == "webdataset"
