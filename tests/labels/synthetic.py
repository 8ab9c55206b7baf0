"""Label sets made of numbers, for tests: no labeler, no images."""

import json
from pathlib import Path

import numpy as np

from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter


def make_spec(
    samples: int = 12, classes: int = 7, grid=(3, 5), top_k: int = 4, view_count: int = 1, **others
) -> LabelSpec:
    """A spec with a grid that is not square and a class count that is no power of anything."""
    kinds = {"kind": "whole"}
    if view_count > 1:
        kinds = {"kind": "random", "seed": 3, "scale": [0.08, 1.0], "ratio": [0.75, 4 / 3], "flip": 0.5}
    settings = {
        "class_names": tuple(f"class {index}" for index in range(classes)),
        "grid": grid,
        "top_k": top_k,
        "views_per_image": view_count,
        "labeler": {"architecture": "synthetic", "weights_sha256": "0" * 64, "licence": "Apache-2.0"},
        "preprocessing": {
            "height": 48,
            "width": 80,
            "interpolation": "area",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "decoder": "none",
        },
        "source": {"samples": samples, "fingerprint": "synthetic"},
        "views": kinds,
        "creation": {"seed": 3},
    }
    return LabelSpec(**{**settings, **others})


def make_arrays(spec: LabelSpec, first: int = 0, last: int | None = None, seed: int = 0, dtype="<f2") -> ShardArrays:
    """Labels of samples [first, last): each sample's numbers depend on its position alone, not on the shards."""
    last = spec.num_samples if last is None else last
    samples = [_make_sample(spec, seed, position) for position in range(first, last)]
    logits = np.stack([sample[0] for sample in samples]).astype(dtype)
    return ShardArrays(
        keys=[make_key(position) for position in range(first, last)],
        content_hash=np.array([sample[3] for sample in samples], dtype=np.uint64),
        class_id=np.array([position % spec.num_classes for position in range(first, last)], dtype=np.uint32),
        views=np.stack([sample[4] for sample in samples]),
        class_ids=np.stack([sample[2] for sample in samples]).astype(spec.id_dtype),
        logits=logits,
        confidence=np.stack([sample[1] for sample in samples]).astype(dtype) if spec.has_confidence else None,
        **make_added(spec, first, last, seed, dtype),
    )


def make_added(spec: LabelSpec, first: int, last: int, seed: int, dtype) -> dict:
    """What version 2 adds, of samples [first, last), as far as the spec has it."""
    added: dict[str, list] = {}
    for position in range(first, last):
        draw = np.random.default_rng([seed, position, 2])
        ids = _make_sample(spec, seed, position)[2]
        free = np.argsort(draw.random((*ids.shape[:-1], spec.num_classes)) + _named(ids, spec.num_classes), axis=-1)
        values = {}
        if spec.draws:
            places = draw.integers(0, min(3, spec.num_classes - spec.top_k), (*ids.shape[:-1], spec.draws))
            values["draws"] = np.take_along_axis(free, places, axis=-1).astype(spec.id_dtype)
        views = spec.views_per_image
        order = np.stack([draw.permutation(spec.num_classes) for _ in range(views)]).astype(spec.id_dtype)
        if spec.class_top_k:
            values["head_ids"] = order[:, : spec.class_top_k]
            values["head_logits"] = -np.sort(draw.random((views, spec.class_top_k))).astype(dtype)
            values["head_confidence"] = draw.uniform(0.1, 0.5 / spec.class_top_k, views).astype(dtype)
        if spec.class_draws:
            places = draw.integers(spec.class_top_k, spec.num_classes, (views, spec.class_draws))
            values["head_draws"] = np.take_along_axis(order, places, axis=-1)
        for name, value in values.items():
            added.setdefault(name, []).append(value)
    arrays = {name: np.stack(parts) for name, parts in added.items()}
    if spec.has_augmentation:
        arrays["augmentation"] = [json.dumps([{"op": "größe", "n": n}] * views) for n in range(first, last)]
    return arrays


def _named(ids, classes):
    """2 where a cell's stored classes name a class, 0 elsewhere: (…, K)."""
    named = np.zeros((*ids.shape[:-1], classes))
    np.put_along_axis(named, ids, 2, axis=-1)
    return named


def make_key(position: int) -> str:
    """A key with a folder; some are not ASCII."""
    return f"folder {position % 3}/größe {position:05d}.JPEG"


def write_set(path: Path, spec: LabelSpec, shards: int = 3, seed: int = 0) -> None:
    """A whole label set in ``path``."""
    with LabelSetWriter(path, spec, shards) as writer:
        for index in writer.todo():
            writer.write_shard(index, make_arrays(spec, *writer.shard_range(index), seed=seed))
        writer.finish()


def _make_sample(spec: LabelSpec, seed: int, position: int):
    draw = np.random.default_rng([seed, position])
    full = draw.gumbel(0, 3, size=(*spec.map_shape[:-1], spec.num_classes))
    ids = np.argsort(-full, axis=-1)[..., : spec.top_k]
    logits = np.take_along_axis(full, ids, axis=-1)
    confidence = 1 / np.exp(full - full.max(-1, keepdims=True)).sum(-1)
    views = np.tile(np.array([1, 0, 0, 0, 1, 0], dtype=np.float32), (spec.views_per_image, 1))
    if spec.views_per_image > 1:
        views[:, [0, 4]] = draw.uniform(0.3, 1, (spec.views_per_image, 2))
        views[:, [2, 5]] = draw.uniform(0, 0.2, (spec.views_per_image, 2))
    return logits, confidence, ids, draw.integers(2**64, dtype=np.uint64), views
