"""Images read where they lie give the batches of packed images, bit for bit, and their faults come out as errors."""

import tarfile

import numpy as np
import pytest
import torch

from stl_offline.distributed import World
from stl_offline.errors import FormatError, InputError
from stl_offline.images.pack import ensure_beton
from stl_offline.images.unpacked import open_unpacked
from stl_offline.loader import ImageSettings, StreamLoader, TokenLabels, TokenLoader
from stl_offline.targets import TokenTargets
from tests.loader.conftest import CLASS_NAMES, SAMPLES, encode, random_views
from tests.loader.test_epochs import equal


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Two tars of the images of `beton`, some of which packing converts; the cache is empty."""
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    for number in range(2):
        with tarfile.open(tmp_path / f"t-{number}.tar", "w") as tar:
            for sample in range(number, SAMPLES, 2):
                file = tmp_path / "image"
                file.write_bytes(encode(sample))
                suffix = "png" if sample % 3 == 0 else "jpg"
                tar.add(file, f"{CLASS_NAMES[sample % len(CLASS_NAMES)]}/image {sample:03d}.{suffix}")
    return str(tmp_path / "t-{0..1}.tar")


def load(images, **settings):
    kind = TokenLoader if images.path.suffix == ".beton" else StreamLoader
    loader = kind(images, ImageSettings((20, 28)), 5, **{"seed": 3} | settings)
    views = random_views(images)
    return list(loader.epoch(2, views))


@pytest.mark.parametrize("share", [{}, {"workers": 2, "world": World(1, 2)}])
def test_batches_equal_those_of_packed_images(tars, share):
    packed, unpacked = ensure_beton(tars), open_unpacked(tars)
    for name in ("keys", "class_names", "fingerprint"):
        assert getattr(unpacked, name) == getattr(packed, name)
    for name in ("class_ids", "key_hashes", "content_hashes", "stored_hashes", "heights", "widths", "raw", "sizes"):
        np.testing.assert_array_equal(getattr(unpacked, name), getattr(packed, name), err_msg=name)
    np.testing.assert_array_equal(unpacked.read_image(7), packed.read_image(7))
    ours, theirs = load(unpacked, **share), load(packed, **share)
    assert len(ours) == len(theirs) > 2
    assert all(equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_token_targets_and_going_on_in_the_middle(beton, make_labels, tars):
    unpacked = open_unpacked(tars)
    label_set, _ = make_labels(grid=(3, 4))
    order = {key.rpartition("/")[2]: number for number, key in enumerate(beton.keys)}
    assert set(order) == {key.rpartition("/")[2] for key in unpacked.keys}
    cache = TokenLabels.of(label_set, (2, 3)).cache
    labels = TokenLabels(TokenTargets("soft", (2, 3), m=3), cache)
    packed = ensure_beton(tars)
    loaders = [
        kind(images, ImageSettings((20, 28)), 5, labels=labels, seed=3)
        for kind, images in ((TokenLoader, packed), (StreamLoader, unpacked))
    ]
    whole, streamed = (list(loader.epoch(1, random_views(packed))) for loader in loaders)
    rest = list(loaders[1].epoch(1, random_views(packed), start_batch=3))
    for ours, theirs in [*zip(streamed, whole, strict=True), *zip(rest, whole[3:], strict=True)]:
        assert equal(ours, theirs)
        assert torch.equal(ours.token_ids, theirs.token_ids)
        assert torch.equal(ours.token_weights, theirs.token_weights)
    epoch = loaders[1].epoch(1, random_views(packed))
    next(epoch)
    epoch.close()
    assert len(list(loaders[1].epoch(1, random_views(packed)))) == len(whole)


def test_the_index_is_made_once_and_again_where_it_is_damaged(tars, tmp_path, monkeypatch):
    first = open_unpacked(tars)
    monkeypatch.setattr("stl_offline.images.unpacked.encode_all", None)
    assert open_unpacked(tars).fingerprint == first.fingerprint
    monkeypatch.undo()
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    first.path.write_bytes(first.path.read_bytes()[:-30])
    assert open_unpacked(tars).fingerprint == first.fingerprint


def test_images_that_change_or_go_are_errors(tars, tmp_path):
    unpacked = open_unpacked(tars)
    sample = next(number for number in range(SAMPLES) if not unpacked.raw[number])
    member = unpacked.images[sample].load.func.__self__
    with open(member.archive.path, "r+b") as tar:
        tar.seek(member.offset + member.size // 2)
        tar.write(b"\xff\xd9\0\0")
    with pytest.raises(FormatError, match=f"the image '{unpacked.keys[sample]}' is not as it was when it was indexed"):
        load(unpacked)
    (tmp_path / "t-1.tar").write_bytes(b"")
    with pytest.raises(FormatError, match="ends within"):
        load(unpacked)


def test_broken_images(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("STL_OFFLINE_CACHE", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0.jpg").write_bytes(encode(1))
    (tmp_path / "images" / "a" / "1.jpg").write_bytes(encode(1)[:200])
    with pytest.raises(InputError, match=r"the image 'a/1\.jpg' of .*`skip_broken`"):
        open_unpacked(tmp_path / "images")
    found = open_unpacked(tmp_path / "images", skip_broken=True)
    assert found.keys == ["a/0.jpg", "b/0.jpg"] == ensure_beton(tmp_path / "images", skip_broken=True).keys
    assert "left out a/1.jpg" in caplog.text
