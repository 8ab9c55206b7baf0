"""Labels joined to webdataset streams: the right ones, of every sample, under shuffling, splits, workers and epochs."""

import gc
import io
import tarfile

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from stl_offline.errors import InputError, JoinError
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.targets import TokenLabels
from stl_offline.webdataset import join_labels
from tests.labels.synthetic import make_arrays, make_spec

# webdataset leaves the tars that it reads open, until its streams are collected.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
SAMPLES, TARS = 36, 4


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def label_set(tmp_path_factory):
    """Of the keys that `make_arrays` names; their order is not that of the tars."""
    place = tmp_path_factory.mktemp("labels") / "set"
    spec = make_spec(SAMPLES)
    with LabelSetWriter(place, spec, 3) as writer:
        for shard in writer.todo():
            writer.write_shard(shard, make_arrays(spec, *writer.shard_range(shard)))
        writer.finish()
    return open_label_set(place)


@pytest.fixture(scope="module")
def tars(label_set, tmp_path_factory):
    """Four tars of nine samples, whose keys are the label set's up to the first dot."""
    folder = tmp_path_factory.mktemp("tars")
    keys = [list(label_set)[place] for place in np.random.default_rng(0).permutation(SAMPLES)]
    for number in range(TARS):
        write_tar(folder / f"train-{number}.tar", keys[number::TARS])
    return str(folder / f"train-{{0..{TARS - 1}}}.tar")


def write_tar(path, keys):
    with tarfile.open(path, "w") as tar:
        for key in keys:
            content = key.encode()
            member = tarfile.TarInfo(f"{stem(key)}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def stem(key):
    """A key as webdataset has it."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


@pytest.fixture
def labels(label_set):
    return TokenLabels.of(label_set, (2, 3), missing="skip")


def full_key(sample):
    return sample["txt"].decode() if isinstance(sample["txt"], bytes) else sample["txt"]


def check(sample, label_set, probabilities=lambda found: found.probabilities):
    """The sample's labels are those of its key in the label set."""
    stored, found = label_set[full_key(sample)], sample["token_labels"]
    np.testing.assert_array_equal(found.class_ids, stored.class_ids)
    np.testing.assert_array_equal(probabilities(found), stored.probabilities())
    np.testing.assert_array_equal(found.views, stored.views)


def first(batch):
    return batch[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_sample_gets_its_own_labels_in_every_epoch(workers, tars, label_set, labels):
    stream = webdataset.WebDataset(tars, shardshuffle=TARS, seed=1, workersplitter=webdataset.split_by_worker)
    joined = join_labels(stream, labels, key=full_key).shuffle(7)
    loader = DataLoader(joined, batch_size=1, num_workers=workers, collate_fn=first)
    orders = []
    for _ in range(2):
        seen = []
        for sample in loader:
            check(sample, label_set)
            seen.append(full_key(sample))
        assert sorted(seen) == sorted(label_set)
        orders.append(seen)
    assert orders[0] != orders[1]


def test_splits_by_node_share_the_samples_out(tars, label_set, labels):
    seen = []
    for rank in range(2):

        def own(urls, rank=rank):
            return [url for number, url in enumerate(urls) if number % 2 == rank]

        stream = webdataset.WebDataset(tars, shardshuffle=False, nodesplitter=own)
        for sample in join_labels(stream, labels, key=full_key):
            check(sample, label_set)
            seen.append(full_key(sample))
    assert sorted(seen) == sorted(label_set)


def test_samples_without_labels(label_set, labels):
    keys = list(label_set)
    stream = [{"__key__": keys[3]}, {"__key__": "unknown"}, {"__key__": f"x/{keys[5]}"}]
    found = [sample["token_labels"] for sample in join_labels(stream, labels, key_prefix="x/=")]
    assert found[1] is None
    np.testing.assert_array_equal(found[2].class_ids, label_set[keys[5]].class_ids)
    ids, weights = labels([found[0].row, found[2].row], np.tile(np.float32([1, 0, 0, 0, 1, 0]), (2, 1)))
    assert ids.shape == (2, 6, 1) and weights.shape == (2, 6, 1)
    assert stream == [{"__key__": keys[3]}, {"__key__": "unknown"}, {"__key__": f"x/{keys[5]}"}]
    strict = TokenLabels.of(label_set, (2, 3))
    with pytest.raises(JoinError, match="1 of 1 samples have no label, such as 'unknown'"):
        list(join_labels(stream, strict))
    with pytest.raises(InputError, match="these token labels have none"):
        join_labels(stream, TokenLabels(strict.targets, strict.cache))
    with pytest.raises(InputError, match="OLD=NEW"):
        join_labels(stream, labels, key_prefix="train")


@pytest.fixture(scope="module")
def paired_tars(label_set, tmp_path_factory):
    """Tars of the label set's order, whose ends are not those of its shards."""
    folder, keys = tmp_path_factory.mktemp("paired"), list(label_set)
    for number in range(TARS):
        write_tar(folder / f"train-{number}.tar", keys[9 * number : 9 * number + 9])
    return str(folder / f"train-{{0..{TARS - 1}}}.tar")


@pytest.mark.parametrize("workers", [0, 2])
def test_label_tars_are_read_beside_image_tars(workers, paired_tars, label_set, tmp_path, monkeypatch):
    """Of a webdataset label set, each shard once for the tars that need it; after the join the stream is shuffled."""
    convert(label_set, tmp_path / "tars", container="webdataset")
    labels, read = open_label_set(tmp_path / "tars"), []
    assert labels.spec.container == "webdataset" and len(labels.shards) == 3
    if not workers:
        original = labels.read_shard
        monkeypatch.setattr(labels, "read_shard", lambda index: read.append(index) or original(index))
    stream = webdataset.WebDataset(paired_tars, shardshuffle=False)
    joined = join_labels(stream, labels, key=full_key).shuffle(20, seed=4)
    loader = DataLoader(joined, batch_size=1, num_workers=workers, collate_fn=first)
    for epoch in range(2):
        seen = []
        for sample in loader:
            check(sample, label_set, lambda found: found.probabilities())
            seen.append(full_key(sample))
        assert sorted(seen) == sorted(label_set)
        assert seen != list(label_set)
        if not workers:  # those of other processes are not seen here
            assert read == [0, 1, 2] * (epoch + 1)


def test_a_label_set_in_another_order_than_the_stream(tars, label_set, caplog):
    stream = webdataset.WebDataset(tars, shardshuffle=False)
    for sample in join_labels([*stream, *stream], label_set, key=full_key):
        check(sample, label_set, lambda found: found.probabilities())
    (told,) = [record.getMessage() for record in caplog.records if record.name == "stl_offline.webdataset"]
    assert "samples of this stream needed another shard" in told
    samples = [{"__key__": "unknown"}, {"__key__": list(label_set)[4]}]
    found = [sample["token_labels"] for sample in join_labels(samples, label_set, missing="skip")]
    assert found[0] is None and found[1].key == samples[1]["__key__"]
    with pytest.raises(JoinError, match="no label for the key 'unknown'"):
        list(join_labels(samples, label_set))
    with pytest.raises(InputError, match="missing must be one of"):
        join_labels(samples, label_set, missing="all")
    with pytest.raises(InputError, match="have a `missing` of their own"):
        join_labels(samples, TokenLabels.of(label_set, (2, 3)), missing="skip")
