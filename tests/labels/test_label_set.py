"""Reading a label set: by key, by shard, and what is refused."""

import json
import multiprocessing
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import stl_offline
from stl_offline.errors import FormatError, InputError, JoinError
from stl_offline.files import sha256_file
from stl_offline.geometry import View
from stl_offline.labels.arrays import probabilities
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.spec import CONTAINERS
from tests.labels.synthetic import make_arrays, make_key, make_spec, write_set


@pytest.fixture(params=CONTAINERS)
def label_set(request, tmp_path):
    spec = make_spec(samples=10, view_count=2, container=request.param)
    write_set(tmp_path, spec, 3)
    return open_label_set(tmp_path)


def test_the_front_door(tmp_path):
    assert stl_offline.open_label_set is open_label_set
    assert stl_offline.__version__
    with pytest.raises(AttributeError, match="no attribute 'open'"):
        _ = stl_offline.open


def test_by_key(label_set):
    arrays = make_arrays(label_set.spec)
    assert len(label_set) == 10 and list(label_set.keys()) == arrays.keys == list(label_set)
    assert label_set.fingerprint == sha256_file(Path(label_set.place) / "manifest.json")
    assert make_key(3) in label_set and "none" not in label_set
    assert "10 images, 3×5 tokens, top 4" in repr(label_set)
    for position in (7, 0, 3, 9):
        found = label_set[make_key(position)]
        assert found.key == make_key(position)
        assert (found.class_id, found.content_hash) == (position % 7, int(arrays.content_hash[position]))
        for name in ("class_ids", "logits", "confidence", "views"):
            assert getattr(found, name).tobytes() == getattr(arrays, name)[position].tobytes()
        assert found.view(1) == View.from_array(arrays.views[position, 1])
    with pytest.raises(JoinError, match="no label for the key 'none'; it has 10 others"):
        label_set["none"]


def test_a_set_is_a_mapping(label_set, monkeypatch):
    assert isinstance(label_set, Mapping)
    keys = list(label_set)
    assert list(label_set.keys()) == keys and len(label_set.keys()) == 10 and keys[4] in label_set.keys()  # noqa: SIM118
    assert label_set.get("none") is None and label_set.get(keys[2]).key == keys[2]
    with pytest.raises(KeyError) as caught:
        label_set["none"]
    assert str(caught.value).startswith(f"the label set {label_set.place} has no label")
    read, real = [], label_set.read_shard
    monkeypatch.setattr(label_set, "read_shard", lambda index: read.append(index) or real(index))
    found = []
    for key, label_map in label_set.items():
        # A look at another shard in between must not make items() read its own again.
        label_set[keys[-1] if key == keys[0] else keys[0]]
        found.append((key, label_map.key))
    assert found == [(key, key) for key in keys]
    assert [index for place, index in enumerate(read) if index not in read[:place]] == [0, 2, 1]
    read.clear()
    assert [label_map.key for label_map in label_set.values()] == keys and read == [0, 1, 2]
    assert label_set == label_set and label_set != open_label_set(label_set.place) and {label_set: 1}
    assert label_set[keys[0]].logits.base is None, "a label map keeps its whole shard in memory"


def read_in_worker(label_set, key):
    """What a worker process gives back: it must open the set for itself."""
    return label_set[key].class_ids.tobytes(), label_set.fingerprint


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_a_set_goes_to_worker_processes(tmp_path, start):
    write_set(tmp_path, make_spec(samples=10), 3)
    label_set = open_label_set(tmp_path)
    key = make_key(5)
    expected = label_set[key].class_ids.tobytes()
    assert len(pickle.dumps(label_set)) < len(pickle.dumps(label_set.manifest)) + 1000
    with multiprocessing.get_context(start).Pool(1) as pool:
        assert pool.apply(read_in_worker, (label_set, key)) == (expected, label_set.fingerprint)


def test_a_maps_probabilities(label_set):
    found = label_set[make_key(5)]
    top = found.probabilities()
    assert top.shape == (2, 3, 5, 4) and top.dtype == np.float32
    assert top.tobytes() == probabilities(found.logits, found.confidence).tobytes()
    np.testing.assert_allclose(top.sum(-1) + found.residual(), 1, atol=1e-3)
    ignore, uniform = found.dense(), found.dense(residual="uniform")
    assert ignore.shape == uniform.shape == (2, 3, 5, 7)
    for view, row, column, rank in np.ndindex(top.shape):
        class_id = found.class_ids[view, row, column, rank]
        assert ignore[view, row, column, class_id] == top[view, row, column, rank]
    assert ((ignore > 0).sum(-1) <= 4).all()
    np.testing.assert_allclose(uniform.sum(-1), 1, atol=2e-3)  # float16 rounds each stored class
    spread = np.broadcast_to(found.residual()[..., None] / 7, uniform.shape)
    np.testing.assert_allclose(uniform - ignore, spread, atol=1e-6)
    with pytest.raises(InputError, match='"ignore" or "uniform"'):
        found.dense(residual="drop")


def test_by_shard(label_set):
    whole = make_arrays(label_set.spec)
    for index, shard in enumerate(label_set.shards):
        arrays = label_set.read_shard(index)
        assert arrays.equals(make_arrays(label_set.spec, shard.first, shard.first + shard.samples))
        keys, content_hashes, class_ids = label_set.read_index(index)
        assert keys == arrays.keys and (class_ids == arrays.class_id).all()
        assert (content_hashes == whole.content_hash[shard.first : shard.first + shard.samples]).all()


def shard_file(label_set, index=1):
    return Path(label_set.place) / label_set.shards[index].name


def test_damage_is_named(label_set):
    file = shard_file(label_set)
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    for read in (label_set.read_shard, label_set.read_index):
        with pytest.raises(FormatError, match=f"{file.name} has {len(data) - 1} bytes, the manifest says {len(data)}"):
            read(1)
    file.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    with pytest.raises(FormatError, match=f"{file.name} is damaged .its SHA-256 differs"):
        label_set.read_shard(1)
    file.unlink()
    for read in (label_set.read_shard, label_set.read_index):
        with pytest.raises(FormatError, match=rf"{file.name}.* is missing"):
            read(1)
    assert label_set.read_shard(0).keys == [make_key(position) for position in range(3)]


def test_another_sets_shard_is_refused(label_set, tmp_path_factory):
    """A shard with a right checksum, but of another label set: the manifest was edited."""
    other = tmp_path_factory.mktemp("other")
    write_set(other, make_spec(samples=10, view_count=1, container=label_set.spec.container), 3)
    entries = json.loads((Path(label_set.place) / "manifest.json").read_bytes())
    theirs = json.loads((other / "manifest.json").read_bytes())
    entries["shards"][1] = theirs["shards"][1]
    (Path(label_set.place) / "manifest.json").write_text(json.dumps(entries))
    shard_file(label_set).write_bytes((other / label_set.shards[1].name).read_bytes())
    with pytest.raises(FormatError, match=label_set.shards[1].name):
        open_label_set(label_set.place).read_shard(1)


def test_a_lying_sample_count_is_seen(label_set):
    entries = json.loads((Path(label_set.place) / "manifest.json").read_bytes())
    entries["shards"][0]["samples"] += 1
    entries["shards"][1]["first"] += 1
    entries["shards"][1]["samples"] -= 1
    (Path(label_set.place) / "manifest.json").write_text(json.dumps(entries))
    lying = open_label_set(label_set.place)
    for read in (lying.read_shard, lying.read_index):
        with pytest.raises(FormatError, match="holds 3 samples, the manifest says 4"):
            read(0)


def test_a_key_in_two_shards_is_refused(tmp_path):
    spec = make_spec(samples=6)
    from stl_offline.labels.writer import LabelSetWriter

    with LabelSetWriter(tmp_path, spec, 2) as writer:
        for index in range(2):
            writer.write_shard(index, make_arrays(spec, 0, 3))
        writer.finish()
    with pytest.raises(FormatError, match="3 keys twice"):
        open_label_set(tmp_path)[make_key(0)]


def test_what_is_no_label_set(tmp_path):
    with pytest.raises(InputError, match="there is no label set at"):
        open_label_set(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not a folder"):
        open_label_set(tmp_path / "file")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(FormatError, match=r"photos holds no label set: it has no manifest.json"):
        open_label_set(tmp_path / "photos")


def test_a_version_from_the_future_is_refused(tmp_path):
    write_set(tmp_path, make_spec())
    entries = json.loads((tmp_path / "manifest.json").read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(entries | {"format_version": 3}))
    with pytest.raises(FormatError, match=r"manifest.json: label set format version 3 is unknown here"):
        open_label_set(tmp_path)
