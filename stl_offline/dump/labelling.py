"""From images to label maps: what a dump's shards, its estimate and a recomputed sample have in common.

B: batch, N: tokens on a grid (Gh, Gw), K: classes, k: classes kept, V: views of an image.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from stl_offline.config import DumpConfig, settings
from stl_offline.device import autocast, pick_amp, pick_workers
from stl_offline.errors import InputError
from stl_offline.evaluation import match_classes
from stl_offline.geometry import CropSettings, draw_views, whole_views
from stl_offline.images.beton import Beton
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec
from stl_offline.loader import DECODER, ImageSettings, TokenLoader
from stl_offline.models import NamedLabeler, find_labeler

# Paths say nothing about a set that its fingerprints do not say better.
_PRIVATE = ("data", "labeler", "labeler_checkpoint", "shards")
# Shards are read whole, and are what a killed job repeats: not too large, and not so small that each one's own
# description weighs (7 kB; an image's labels are 1 to 3 kB).
_SHARD_SAMPLES, _LEAST_SHARD_SAMPLES, _SHARDS = 4096, 512, 8
_SHARD_MAPS = 16 * _SHARD_SAMPLES


class Labelling:
    """A labeler with the images that it labels, as a `DumpConfig` asks for.

    spec: the label set's settings; num_shards: of how many files; views: float32 (V, n, 6).

    Raises:
        StlError: images, labeler and settings that do not go together.
    """

    def __init__(self, config: DumpConfig, beton: Beton, device: torch.device) -> None:
        self.config, self.beton, self.device = config, beton, device
        self.named = find_labeler(
            config.labeler,
            config.labeler_checkpoint,
            config.img_size,
            by_order=config.labeler_by_order,
            mean=config.labeler_mean,
            std=config.labeler_std,
        )
        if config.interpolation == "auto":
            # The set records what this came to.
            self.config = config = replace(config, interpolation=self.named.interpolation)
        self.num_shards = config.shards or pick_shards(len(beton), config.views)
        self.spec = _make_spec(config, self.named, beton)
        self.class_map = match_classes(beton, self.named.class_names, f"the labeler {config.labeler}")
        self.views = make_views(config, beton)
        self.labeler = self.named.model.to(device).eval().to(memory_format=torch.channels_last)

    @cached_property
    def loader(self) -> TokenLoader:
        """Gives the images as the labeler takes them."""
        side = self.named.img_size
        images = ImageSettings((side, side), self.labeler.mean, self.labeler.std, self.config.interpolation)
        workers = pick_workers(self.config.workers)
        return TokenLoader(
            self.beton, images, self.config.batch_size, workers=workers, device=self.device, shuffle=False
        )

    @torch.inference_mode()
    def label(self, samples: np.ndarray, done: Callable[[int], object]) -> ShardArrays:
        """Label these samples (n,); ``done(B)`` is called after each batch.

        No batch holds other samples than these, so what comes out depends on nothing else.

        Raises:
            InputError: the labeler gives NaN or infinity (names an image), or an image cannot be decoded.
        """
        shape = (len(samples), *self.spec.map_shape)
        ids = np.empty(shape, dtype=self.spec.id_dtype)
        logits = np.empty(shape, dtype=np.float32)
        confidence = np.empty(shape[:-1], dtype=np.float32)
        amp = pick_amp(self.config.amp, self.device)
        for view, views in enumerate(self.views):
            first = 0
            with self.loader.epoch(0, views, sample_ids=samples) as batches:
                for batch in batches:
                    with autocast(self.device, amp):
                        token_logits = self.labeler(batch.images)[1]
                    labels = top_k_labels(token_logits, self.config.top_k)
                    if not bool(torch.isfinite(labels[2]).all()):
                        raise InputError(
                            f"the labeler gives logits that are not finite for images such as "
                            f"{self.beton.keys[int(batch.sample_ids[0])]!r}; are its weights whole?"
                        )
                    rows = slice(first, first + len(batch))
                    for target, values in zip((ids, logits, confidence), labels, strict=True):
                        target[rows, view] = values.cpu().numpy().reshape(len(batch), *target.shape[2:])
                    first = rows.stop
                    done(len(batch))
        return ShardArrays(
            keys=[self.beton.keys[sample] for sample in samples],
            content_hash=self.beton.content_hashes[samples],
            class_id=self.class_map[self.beton.class_ids[samples]],
            views=np.ascontiguousarray(self.views[:, samples].transpose(1, 0, 2)),
            class_ids=ids,
            logits=logits,
            confidence=confidence,
        )


def make_views(config: DumpConfig, beton: Beton) -> np.ndarray:
    """The views to label: float32 (V, n, 6); the whole image, or V random crops as a student would draw them."""
    if config.views == 0:
        return whole_views(len(beton))[None]
    crops = CropSettings(scale=(config.scale_min, 1.0), flip=config.flip)
    samples = np.arange(len(beton))
    return np.stack(
        [draw_views(config.seed, view, samples, beton.heights, beton.widths, crops) for view in range(config.views)]
    )


def top_k_labels(token_logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token logits (B, N, K) → class ids (B, N, k), their logits (B, N, k), confidence (B, N); float32, best first."""
    token_logits = token_logits.float()
    logits, ids = token_logits.topk(k, dim=-1)
    confidence = torch.exp(logits[..., 0] - torch.logsumexp(token_logits, dim=-1))
    return ids, logits, confidence


def pick_shards(samples: int, views: int) -> int:
    """How many shards suit ``samples`` images: of some 4,000, but 8 of them where none gets smaller than 512.

    Of many crops they hold fewer images: a process has two shards' logits in memory, and loses one's work in a kill.
    """
    most = max(1, min(_SHARD_SAMPLES, _SHARD_MAPS // max(1, views)))
    least = min(_LEAST_SHARD_SAMPLES, most)
    return max(min(_SHARDS, samples // least), -(-samples // most), 1)


def _make_spec(config: DumpConfig, named: NamedLabeler, beton: Beton) -> LabelSpec:
    """The manifest's settings. Neither paths nor dates enter it: the same job gives the same bytes anywhere."""
    classes = len(named.class_names)
    if config.top_k > classes:
        raise InputError(f"--top-k {config.top_k} asks for more classes than the labeler's {classes}")
    if config.shards > len(beton):
        raise InputError(f"--shards {config.shards} is more than the {len(beton)} images; use fewer shards")
    side = named.img_size
    random_views = {"kind": "random", "seed": config.seed, "scale": [config.scale_min, 1.0], "ratio": [3 / 4, 4 / 3]}
    return LabelSpec(
        class_names=named.class_names,
        grid=tuple(named.model.grid_size(side, side)),
        top_k=config.top_k,
        views_per_image=max(1, config.views),
        labeler={
            "architecture": named.architecture,
            "weights_sha256": named.weights_sha256,
            "licence": config.licence,
        },
        preprocessing={
            "height": side,
            "width": side,
            "interpolation": config.interpolation,
            "mean": list(named.model.mean),
            "std": list(named.model.std),
            "decoder": DECODER,
        },
        source={"samples": len(beton), "fingerprint": beton.fingerprint},
        views=random_views | {"flip": config.flip} if config.views else {"kind": "whole"},
        creation={name: value for name, value in settings(config).items() if name not in _PRIVATE},
        encoding=config.encoding,
        container=config.format,
    )
