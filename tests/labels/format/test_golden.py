"""Bytes that must never change: shards and a manifest as this version of the format was first written.

A round trip misses a change that writer and reader make together; these files do not.
"""

import dataclasses
import hashlib
import json
import zlib
from pathlib import Path

import numcodecs
import numpy as np
import pytest
import zarr

from stl_offline.errors import FormatError
from stl_offline.files import sha256_bytes
from stl_offline.labels import rules
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.format import containers
from stl_offline.labels.manifest import Manifest, ShardRecord, shard_name
from stl_offline.labels.spec import CONTAINERS, ENCODINGS, LabelSpec

DATA = Path(__file__).parent / "data"

# What the libraries that pack these bytes were when they were pinned: others may pack the same content otherwise.
PACKED_BY = {"zarr": (zarr.__version__, numcodecs.__version__), "webdataset": (zlib.ZLIB_RUNTIME_VERSION,)}
PINNED_WITH = {"zarr": ("3.1.6", "0.16.6"), "webdataset": ("1.2.13",)}
PINNED = {
    ("zarr", "f16"): "6e6b55f574603cb35a1b05151d8a0fdceb216c14cf0b5383f52d45a1e5574aee",
    ("zarr", "q8"): "bc45ff55b82bd16ea399e3ebde51013a83e1272827e1f509517998c59728406e",
    ("webdataset", "f16"): "00d5331e6bb67e3f82fee204e785537ac9d65e5c8381ed4255b98bd7e9025883",
    ("webdataset", "q8"): "c2e2e6458514a67b6ca6ee7be4a5af7455027ccb17159034175415be69df5aea",
}
PINNED_2 = {
    ("zarr", "f16"): "c27ee1feb8428ae815005fa90f6a1f4d5d049c23b9f3a7afa45f004407f54f92",
    ("zarr", "q8"): "f03d3942cb2569b56056de328186a0365e863547f0235fe17f3e1982f69b0b8f",
    ("webdataset", "f16"): "43a44f44d3a130fd348a8dfc76a84f6c06e401ea11e32b5783cf061d2c9a3050",
    ("webdataset", "q8"): "34e938da581d7de45fb4acd53c6318ec9c12b7cbfdde7084e7a78ab42b240247",
}
MANIFEST_2 = "fa05bd144f10be68ea3cd94ee5f1253bc9a2dd7f26d184cdda57896a71fb81b3"
MANIFEST = "5b36b426103bd43342db6dbd95449021dffad95361f814d94c3c11bf53eb3856"


def golden_file(container: str, encoding: str) -> Path:
    return DATA / f"{container}-{encoding}.shard"


def golden_spec(container: str, encoding: str) -> LabelSpec:
    return LabelSpec(
        class_names=("cat", "dog", "größe", "tree", "car"),
        grid=(2, 3),
        top_k=3,
        views_per_image=2,
        labeler={"architecture": "fan_micro_4_p8_token", "weights_sha256": "ab" * 32, "licence": "Apache-2.0"},
        preprocessing={
            "height": 16,
            "width": 24,
            "interpolation": "area",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "decoder": "libjpeg-turbo",
        },
        source={"samples": 2, "fingerprint": "cd" * 32},
        views={"kind": "random", "seed": 7, "scale": [0.25, 1.0], "ratio": [0.75, 1.3333333333333333], "flip": 0.5},
        creation={"batch_size": 2},
        encoding=encoding,
        container=container,
    )


def golden_arrays(spec: LabelSpec) -> ShardArrays:
    """Numbers that can be written down: no generator, no rounding in either encoding."""
    cells = np.arange(2 * 2 * 2 * 3).reshape(2, 2, 2, 3)
    gaps = np.stack([np.zeros_like(cells), cells + 1, 3 * cells + 20], axis=-1)
    return ShardArrays(
        keys=["n01/cat one.JPEG", "n02/größe.png"],
        content_hash=np.array([0x0123456789ABCDEF, 2**64 - 2], dtype=np.uint64),
        class_id=np.array([0, 2], dtype=np.uint32),
        views=np.array(
            [[[0.5, 0, 0.25, 0, 0.75, 0.125], [-0.5, 0, 1, 0, 1, 0]], [[1, 0, 0, 0, 1, 0], [0.25, 0, 0, 0, 0.5, 0.5]]],
            dtype=np.float32,
        ),
        class_ids=np.stack([cells % 5, (cells + 1) % 5, (cells + 3) % 5], axis=-1).astype("<u2"),
        logits=(-gaps * (5 / 128)).astype("<f2"),
        confidence=np.exp(-0.0088 * (10 * cells + 3)).astype("<f2"),
    )


def golden_spec_2(container: str, encoding: str) -> LabelSpec:
    """All that version 2 adds."""
    spec = golden_spec(container, encoding)
    views = spec.views | {"first": 10}
    added = {"draws": 2, "draw_seed": 7, "class_top_k": 2, "class_draws": 1, "has_augmentation": True}
    return dataclasses.replace(spec, format_version=2, top_k=1, views=views, **added)


def golden_arrays_2(spec: LabelSpec) -> ShardArrays:
    """The best class of version 1's labels, and numbers that can be written down beside it."""
    old = golden_arrays(golden_spec(spec.container, spec.encoding))
    cells = np.arange(2 * 2 * 2 * 3).reshape(2, 2, 2, 3)
    return dataclasses.replace(
        old,
        class_ids=np.ascontiguousarray(old.class_ids[..., :1]),
        logits=np.ascontiguousarray(old.logits[..., :1]),
        draws=np.stack([(cells + 2) % 5, (cells + 4) % 5], axis=-1).astype("<u2"),
        head_ids=np.array([[[1, 0], [2, 4]], [[3, 1], [0, 1]]], dtype="<u2"),
        head_logits=np.array([[[4, 1.5], [2, -2]], [[0, -0.25], [8, 0]]], dtype="<f2"),
        head_confidence=np.array([[0.75, 0.5], [0.25, 1]], dtype="<f2"),
        head_draws=np.array([[[3], [0]], [[4], [2]]], dtype="<u2"),
        augmentation=['[{"op":"Rotate","degrees":9},null]', '["größe",{}]'],
    )


@pytest.fixture
def any_sum(monkeypatch):
    """Without the rule on sums: the numbers pinned for version 1 were invented before it, and are no distributions."""
    monkeypatch.setattr(rules, "sum_limit", lambda *_: (np.inf, 0.0, 0.0, 0.0))


every_kind = pytest.mark.parametrize(("container", "encoding"), [(c, e) for c in CONTAINERS for e in ENCODINGS])


@every_kind
def test_old_shards_are_read(any_sum, container, encoding):
    spec = golden_spec(container, encoding)
    data = golden_file(container, encoding).read_bytes()
    assert hashlib.sha256(data).hexdigest() == PINNED[container, encoding]
    assert containers.decode_shard(data, spec).equals(golden_arrays(spec))
    assert containers.read_shard_index(data, spec)[0] == golden_arrays(spec).keys


@every_kind
def test_new_shards_have_the_same_bytes(any_sum, container, encoding):
    if PACKED_BY[container] != PINNED_WITH[container]:
        pytest.skip(f"pinned with {PINNED_WITH[container]}, here {PACKED_BY[container]}")
    spec = golden_spec(container, encoding)
    assert sha256_bytes(containers.encode_shard(golden_arrays(spec), spec)) == PINNED[container, encoding]


@every_kind
def test_numbers_that_are_no_distribution_are_refused(container, encoding):
    with pytest.raises(FormatError, match="the probabilities of a cell sum to more than 1"):
        containers.decode_shard(golden_file(container, encoding).read_bytes(), golden_spec(container, encoding))


@every_kind
def test_shards_of_version_2(container, encoding):
    spec = golden_spec_2(container, encoding)
    data = (DATA / f"{container}-{encoding}-2.shard").read_bytes()
    assert hashlib.sha256(data).hexdigest() == PINNED_2[container, encoding]
    assert containers.decode_shard(data, spec).equals(golden_arrays_2(spec))
    if PACKED_BY[container] == PINNED_WITH[container]:
        assert containers.encode_shard(golden_arrays_2(spec), spec) == data


def test_the_manifests_bytes_of_version_2():
    spec = golden_spec_2("zarr", "q8")
    manifest = Manifest(spec, (ShardRecord(shard_name(0, 1, "zarr"), 0, 2, 1234, "ab" * 32),)).to_bytes()
    assert sha256_bytes(manifest) == MANIFEST_2
    assert Manifest.from_bytes(manifest).spec == spec


def test_the_manifests_bytes():
    spec = golden_spec("zarr", "q8")
    data = golden_file("zarr", "q8").read_bytes()
    record = ShardRecord(shard_name(0, 1, "zarr"), 0, 2, len(data), sha256_bytes(data))
    manifest = Manifest(spec, (record,)).to_bytes()
    assert sha256_bytes(manifest) == MANIFEST
    assert list(json.loads(manifest)) == sorted(json.loads(manifest))
    assert Manifest.from_bytes(manifest).spec == spec
