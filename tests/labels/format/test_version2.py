"""Version 2: draws, answers of the class head, augmentation records, plain .npz members; version 1 stays as it is."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr
from numcodecs import blosc

from stl_offline.errors import FormatError, InputError
from stl_offline.labels.convert import convert
from stl_offline.labels.format import containers
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS, ENCODINGS, LabelSpec
from stl_offline.labels.verify import verify
from tests.labels import npz_reader, tar_reader
from tests.labels.synthetic import make_arrays, make_spec, write_set
from tests.labels.test_strangers import read_with_webdataset

HEAD = {"class_top_k": 2, "class_draws": 3}
KINDS = {
    "draws": {"top_k": 0, "draws": 3, "has_confidence": False},
    "one draw of crops": {"top_k": 0, "draws": 1, "has_confidence": False, "view_count": 3},
    "draws and confidence": {"top_k": 0, "draws": 2},
    "hybrid": {"top_k": 2, "draws": 5, "draw_seed": 3},
    "class answers": {"top_k": 2, "view_count": 2, "has_augmentation": True, **HEAD},
    "all": {"top_k": 3, "draws": 2, "view_count": 2, "has_augmentation": True, **HEAD},
    "top-k alone": {"format_version": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
every_form = pytest.mark.parametrize(("container", "encoding"), [(c, e) for c in CONTAINERS for e in ENCODINGS])


@every_kind
@every_form
def test_a_shard_comes_back(kind, container, encoding):
    spec = make_spec(container=container, encoding=encoding, **kind)
    assert spec.format_version == 2 and LabelSpec.from_json(spec.to_json()) == spec
    arrays = make_arrays(spec)
    data = containers.encode_shard(arrays, spec)
    assert containers.encode_shard(arrays, spec) == data
    found = containers.decode_shard(data, spec)
    for name in ("draws", "head_ids", "head_logits", "head_confidence", "head_draws", "class_ids", "views"):
        assert np.array_equal(getattr(found, name), getattr(arrays, name)), name
    assert (found.keys, found.augmentation) == (arrays.keys, arrays.augmentation)
    if encoding == "f16":
        assert found.equals(arrays)
    assert containers.encode_shard(found, spec) == data
    index = containers.read_shard_index(data, spec)
    assert index.keys == arrays.keys and (index.content_hashes == arrays.content_hash).all()


@every_form
def test_what_version_1_can_hold_is_version_1(container, encoding):
    spec = make_spec(container=container, encoding=encoding)
    assert spec.format_version == 1 and not {"draws", "draw_seed"} & spec.to_json().keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"draws": 2, "format_version": 1}, "version 1 has no draws"),
        ({"top_k": 0}, "top-k must lie between 1"),
        ({"draws": -1}, "draws must lie between 0 and 4,096"),
        ({"draws": 2, "top_k": 7}, "nothing is left to draw from"),
        ({"class_draws": 1, "class_top_k": 7}, "class head are all classes: nothing is left to draw from"),
        ({"has_confidence": False}, "top-k labels have a confidence"),
        ({"class_top_k": 8}, "class_top_k must lie between 0 and 7"),
        ({"draws": 1, "draw_seed": -1}, "draw_seed must be"),
        ({"has_augmentation": 1}, "has_augmentation must be true or false"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        make_spec(**changes)


def test_a_first_view_is_of_random_views_and_version_2():
    views = make_spec(view_count=2).views
    spec = make_spec(view_count=2, views=views | {"first": 30})
    assert (spec.format_version, spec.first_view) == (2, 30)
    with pytest.raises(InputError, match="first view"):
        make_spec(views={"kind": "whole", "first": 3})


@every_kind
def test_both_containers_hold_the_same_and_nothing_is_lost(kind, tmp_path):
    spec = make_spec(encoding="q8", **kind)
    write_set(tmp_path / "zarr", spec)
    convert(open_label_set(tmp_path / "zarr"), tmp_path / "tar", container="webdataset", encoding="f16")
    convert(open_label_set(tmp_path / "tar"), tmp_path / "back", container="zarr", encoding="q8")
    for file in (tmp_path / "zarr").glob("*.zarr.zip"):
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
    assert not verify(open_label_set(tmp_path / "tar")).faults


def test_version_1_to_2_and_back(tmp_path):
    write_set(tmp_path / "one", make_spec(encoding="q8"))
    convert(open_label_set(tmp_path / "one"), tmp_path / "two", format_version=2)
    assert open_label_set(tmp_path / "two").spec.format_version == 2
    convert(open_label_set(tmp_path / "two"), tmp_path / "back", format_version=1)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
    write_set(tmp_path / "draws", make_spec(draws=2))
    with pytest.raises(InputError, match="version 1 has no draws"):
        convert(open_label_set(tmp_path / "draws"), tmp_path / "no", format_version=1)


@every_form
def test_draws_that_cannot_be_are_refused(container, encoding):
    spec = make_spec(container=container, encoding=encoding, top_k=2, draws=3)
    arrays = make_arrays(spec)
    arrays.draws[4, 0, 1, 2, 0] = arrays.class_ids[4, 0, 1, 2, 1]
    with pytest.raises(FormatError, match="a drawn class is"):
        containers.encode_shard(arrays, spec)
    arrays.draws[4, 0, 1, 2, 0] = 7
    with pytest.raises(FormatError, match="a drawn class is"):
        containers.encode_shard(arrays, spec)


@pytest.mark.parametrize("kind", ["hybrid", "one draw of crops"])
def test_plain_zarr_reads_draws(tmp_path, kind):
    spec = make_spec(**KINDS[kind])
    (tmp_path / "a.zarr.zip").write_bytes(containers.encode_shard(make_arrays(spec), spec))
    with zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="r") as store:
        assert (zarr.open_group(store, mode="r")["draws"][:] == make_arrays(spec).draws).all()


def test_a_single_draw_is_read_in_either_byte_order():
    """Big-endian as it is written now, which packs better; little-endian in the sets written before."""
    spec = make_spec(**KINDS["one draw of crops"])
    arrays = make_arrays(spec)
    assert arrays.draws.max() > 0
    with zipfile.ZipFile(io.BytesIO(containers.encode_shard(arrays, spec))) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    metadata = json.loads(entries["draws/zarr.json"])
    assert metadata["codecs"][0] == {"name": "bytes", "configuration": {"endian": "big"}}
    big = np.empty(arrays.draws.size, dtype=">u2")
    blosc.decompress(entries["draws/c/0/0/0/0/0"], big)
    metadata["codecs"][0]["configuration"]["endian"] = "little"
    entries["draws/zarr.json"] = json.dumps(metadata).encode()
    entries["draws/c/0/0/0/0/0"] = numcodecs.Blosc("zstd", 9, numcodecs.Blosc.SHUFFLE).encode(big.astype("<u2"))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    found = containers.decode_shard(stream.getvalue(), spec)
    assert found.equals(arrays) and found.draws.dtype == np.dtype("<u2")


def test_webdataset_and_numpy_read_a_member(tmp_path):
    spec = make_spec(container="webdataset", **KINDS["all"])
    arrays = make_arrays(spec)
    (tmp_path / "a.tar").write_bytes(containers.encode_shard(arrays, spec))
    samples = read_with_webdataset(tmp_path / "a.tar")
    assert [str(sample["labels.npz"]["key"]) for sample in samples] == arrays.keys
    for name in ("class_ids", "logits", "draws", "head_ids", "head_draws", "views"):
        assert (np.stack([sample["labels.npz"][name] for sample in samples]) == getattr(arrays, name)).all()


def test_hugging_face_datasets_reads_shapes_intact(tmp_path):
    datasets = pytest.importorskip("datasets")
    spec = make_spec(container="webdataset", **KINDS["all"])
    arrays = make_arrays(spec)
    (tmp_path / "labels-00000-of-00001.tar").write_bytes(containers.encode_shard(arrays, spec))
    files = {"train": str(tmp_path / "labels-00000-of-00001.tar")}
    found = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert len(found) == len(arrays)
    for row, sample in enumerate(found):
        labels = sample["labels.npz"]
        assert labels["key"] == arrays.keys[row] and labels["augmentation"] == arrays.augmentation[row]
        assert labels["content_hash"] == [int(arrays.content_hash[row])]
        for name in ("class_ids", "logits", "confidence", "draws", "views", "head_ids", "head_logits", "head_draws"):
            value = np.array(labels[name])
            assert value.shape == getattr(arrays, name)[row].shape and (value == getattr(arrays, name)[row]).all(), name


def broken_members(data: bytes):
    """Tars whose first label is another .npz."""
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(info.name, archive.extractfile(info).read()) for info in archive]
    with zipfile.ZipFile(io.BytesIO(members[1][1])) as label:
        entries = {name: label.read(name) for name in label.namelist()}

    def tar(packed: bytes) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, content in [members[0], (members[1][0], packed), *members[2:]]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return stream.getvalue()

    def npz(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return stream.getvalue()

    yield "another array", tar(npz(entries | {"more.npy": b""}))
    yield "a missing array", tar(npz({name: entries[name] for name in list(entries)[:-1]}))
    yield "another order", tar(npz(dict(reversed(entries.items()))))
    yield "not deflated", tar(npz(entries, zipfile.ZIP_STORED))
    yield "too large", tar(npz(entries | {"draws.npy": bytes(1 << 24)}))
    yield "a pickle", tar(npz(entries | {"key.npy": entries["key.npy"].replace(b"'<U", b"'|O")}))
    yield "cut off", tar(members[1][1][:-30])
    yield "no zip", tar(b"x" * 400)
    damaged = bytearray(members[1][1])
    damaged[200] ^= 0xFF
    yield "damaged", tar(bytes(damaged))


def test_members_of_others_are_refused():
    spec = make_spec(container="webdataset", **KINDS["hybrid"])
    data = containers.encode_shard(make_arrays(spec), spec)
    for what, broken in broken_members(data):
        with pytest.raises(FormatError, match="shard"):
            print(what)
            containers.decode_shard(broken, spec)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["draws", "one draw of crops", "hybrid", "all", "top-k alone"])
def test_a_strangers_reader_gives_the_same(kind, encoding, tmp_path):
    write_set(tmp_path, make_spec(container="webdataset", encoding=encoding, **KINDS[kind]))
    samples = list(npz_reader.read_label_set(tmp_path))
    labels = open_label_set(tmp_path)
    assert [sample["key"] for sample in samples] == list(labels)
    for sample, expected in zip(samples, labels.values(), strict=True):
        assert (sample["class_id"], sample["content_hash"]) == (expected.class_id, expected.content_hash)
        ids, masses = expected.entries()
        assert (sample["class_ids"] == ids).all() and (sample["views"] == expected.views).all()
        np.testing.assert_allclose(sample["masses"], masses, rtol=1e-5, atol=1e-6)
        # With draws nothing is left over, but for rounding; the dense distribution and the listed one are the same.
        dense = expected.dense()
        if expected.draws is not None:
            np.testing.assert_allclose(dense.sum(-1), 1, rtol=0.02)
            listed = expected.listed()
            np.testing.assert_allclose(listed.dense(), dense, rtol=1e-5, atol=1e-6)
            assert (np.diff(listed.probabilities(), axis=-1) <= 0).all()


def test_the_strangers_reader_is_short_and_uses_nothing_of_ours():
    source = Path(npz_reader.__file__).read_text()
    assert len(source.splitlines()) <= 70 and "stl_offline" not in source


def test_the_reader_of_version_1_refuses_version_2_by_name(tmp_path):
    write_set(tmp_path, make_spec(container="webdataset", draws=2))
    with pytest.raises(ValueError, match="not a label set of version 1"):
        next(tar_reader.read_label_set(tmp_path))
