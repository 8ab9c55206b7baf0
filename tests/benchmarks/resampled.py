"""Label sets of any size with a real one's statistics: its maps, moved, under other class ids.

A synthetic image is a map of a real image, rolled by some rows and columns, with every class id moved by one
number. So the numbers of classes in an image, their repetition from token to token, logits and confidences are those
of the real labeler, and no two images are alike.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from stl_offline.labels.arrays import ShardArrays, probabilities
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter


class Resampler:
    """Draws label maps from those of ``label_set``; ``grid`` and ``top_k`` may be smaller than its own."""

    def __init__(self, label_set: LabelSet, grid: tuple[int, int] | None = None, top_k: int | None = None) -> None:
        shards = [label_set.read_shard(index) for index in range(len(label_set.shards))]
        self._ids = np.concatenate([shard.class_ids[:, 0] for shard in shards])
        self._logits = np.concatenate([shard.logits[:, 0] for shard in shards])
        self._confidence = np.concatenate([shard.confidence[:, 0] for shard in shards])
        self._like = label_set.spec
        self.grid = grid or label_set.spec.grid
        self.top_k = top_k or label_set.spec.top_k

    def spec(self, samples: int, encoding: str, container: str = "zarr", draws: int = 0) -> LabelSpec:
        """The settings of a set of ``samples`` images: of draws alone, if there are any."""
        kind = {"top_k": self.top_k}
        if draws:
            kind = {"top_k": 0, "draws": draws, "has_confidence": False, "format_version": None}
        return replace(
            self._like,
            grid=self.grid,
            source={"samples": samples, "fingerprint": "resampled"},
            encoding=encoding,
            container=container,
            bounds=None,
            **kind,
        )

    def arrays(self, spec: LabelSpec, first: int, last: int) -> ShardArrays:
        """The labels of the images [first, last) of all that can be drawn."""
        draw = np.random.default_rng([7, first])
        n, (height, width) = last - first, self._ids.shape[1:3]
        image = draw.integers(len(self._ids), size=(n, 1, 1))
        row = (draw.integers(height, size=(n, 1, 1)) + np.arange(self.grid[0])[:, None]) % height
        column = (draw.integers(width, size=(n, 1, 1)) + np.arange(self.grid[1])) % width
        shift = draw.integers(spec.num_classes, size=(n, 1, 1, 1))
        ids = (self._ids[image, row, column, : self.top_k] + shift) % spec.num_classes
        labels = {
            "class_ids": ids.astype(spec.id_dtype)[:, None],
            "logits": self._logits[image, row, column, : self.top_k][:, None],
            "confidence": self._confidence[image, row, column][:, None],
        }
        if spec.draws:
            labels = _drawn(labels, spec, draw)
        return ShardArrays(
            keys=[key(position) for position in range(first, last)],
            content_hash=np.arange(first, last, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15),
            class_id=draw.integers(spec.num_classes, size=n),
            views=np.tile(np.array([1, 0, 0, 0, 1, 0], dtype=np.float32), (n, 1, 1)),
            **labels,
        )


def _drawn(labels: dict[str, np.ndarray], spec: LabelSpec, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Draws from the top k and, for what these leave out, from all classes evenly."""
    ids, mass = labels["class_ids"], probabilities(labels["logits"], labels["confidence"])
    chance = draw.random((*mass.shape[:-1], spec.draws, 1))
    place = (chance >= mass.cumsum(axis=-1)[..., None, :]).sum(axis=-1)
    drawn = draw.integers(spec.num_classes, size=place.shape)
    listed = place < ids.shape[-1]
    named = np.take_along_axis(ids, np.minimum(place, ids.shape[-1] - 1), axis=-1)
    none = (*ids.shape[:-1], 0)
    return {
        "class_ids": np.empty(none, ids.dtype),
        "logits": np.empty(none, "<f2"),
        "draws": np.where(listed, named, drawn).astype(spec.id_dtype),
    }


def key(position: int) -> str:
    """A key as ImageNet's files are called."""
    return f"train/n{position % 1000:08d}/n{position % 1000:08d}_{position:08d}.JPEG"


def make_set(
    source: str,
    out: Path,
    images: int,
    shards: int,
    encoding: str = "q8",
    start: int = 0,
    draws: int = 0,
    **smaller: object,
) -> LabelSet:
    """A resampled set in ``out``, of the images from ``start`` on; one that is there already is taken."""
    resampler = Resampler(open_label_set(source), **smaller)
    with LabelSetWriter(out, resampler.spec(images, encoding, draws=draws), shards) as writer:
        for index in writer.todo():
            first, last = writer.shard_range(index)
            writer.write_shard(index, resampler.arrays(writer.spec, start + first, start + last))
        writer.finish()
    return open_label_set(out)
