"""``stl-offline dump-labels``: run a labeler over pictures once and write what it says of each token.

B: batch, N: tokens on a grid (Gh, Gw), K: classes, k: classes kept, V: views of a picture.
"""

import concurrent.futures
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stl_offline.config import DumpConfig, settings
from stl_offline.device import autocast, pick_amp, pick_device, pick_workers
from stl_offline.distributed import World, join_world, wait_for_world
from stl_offline.errors import InputError
from stl_offline.images.beton import Beton
from stl_offline.images.pack import ensure_beton
from stl_offline.labelers import NamedLabeler, find_labeler
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.job import job_from_environment
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.loader import DECODER, TokenLoader
from stl_offline.models import TokenLabeler
from stl_offline.progress import progress_bar
from stl_offline.scoring import match_classes
from stl_offline.views import CropSettings, draw_views, whole_views

# Paths say nothing about a set that its fingerprints do not say better.
_PRIVATE = ("data", "labeler", "labeler_checkpoint")


@dataclass(frozen=True)
class DumpReport:
    """What a dump job did: ``labelled`` pictures in this run, of ``samples`` in the set."""

    path: str
    samples: int
    labelled: int
    seconds: float
    bytes: int


def dump_labels(config: DumpConfig) -> DumpReport:
    """Write a label set, or go on with one that a killed job left.

    Raises:
        StlError: bad input, or a folder that belongs to another job.
    """
    device = pick_device(config.device)
    world = join_world(device)
    named = find_labeler(
        config.labeler,
        config.labeler_checkpoint,
        config.img_size,
        by_order=config.labeler_by_order,
        mean=config.labeler_mean,
        std=config.labeler_std,
    )
    beton = ensure_beton(config.data, skip_broken=config.skip_broken)
    spec = _make_spec(config, named, beton)
    class_map = match_classes(beton, named.class_names, f"the labeler {config.labeler}")
    views = make_views(config, beton)
    started = time.perf_counter()
    with LabelSetWriter(config.out, spec, config.shards, job=job_from_environment()) as writer:
        todo = writer.todo(world.rank, world.size)
        if todo:
            _write_shards(_Job(config, named, beton, class_map, views, device), writer, todo, world)
        wait_for_world(world)
        manifest = writer.finish()
    labelled = sum(last - first for first, last in map(writer.shard_range, todo))
    size = sum(shard.bytes for shard in manifest.shards)
    return DumpReport(str(config.out), len(beton), labelled, time.perf_counter() - started, size)


def make_views(config: DumpConfig, beton: Beton) -> np.ndarray:
    """The views to label: float32 (V, n, 6); the whole picture, or V random crops as a student would draw them."""
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


def _make_spec(config: DumpConfig, named: NamedLabeler, beton: Beton) -> LabelSpec:
    """The manifest's settings. Neither paths nor dates enter it: the same job gives the same bytes anywhere."""
    classes = len(named.class_names)
    if config.top_k > classes:
        raise InputError(f"--top-k {config.top_k} asks for more classes than the labeler's {classes}")
    if config.shards > len(beton):
        raise InputError(f"--shards {config.shards} is more than the {len(beton)} pictures; use fewer shards")
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


class _Job:
    """What every shard needs; loads and labels one shard at a time."""

    def __init__(
        self,
        config: DumpConfig,
        named: NamedLabeler,
        beton: Beton,
        class_map: np.ndarray,
        views: np.ndarray,
        device: torch.device,
    ) -> None:
        self.config, self.beton, self.class_map, self.views, self.device = config, beton, class_map, views, device
        self.labeler: TokenLabeler = named.model.to(device).eval().to(memory_format=torch.channels_last)
        side = named.img_size
        self.grid = tuple(self.labeler.grid_size(side, side))
        self.amp = pick_amp(config.amp, device)
        self.loader = TokenLoader(
            beton,
            (side, side),
            config.batch_size,
            workers=pick_workers(config.workers),
            seed=0,
            device=device,
            mean=self.labeler.mean,
            std=self.labeler.std,
            shuffle=False,
            interpolation=config.interpolation,
        )

    @torch.inference_mode()
    def label(self, first: int, last: int, id_dtype: np.dtype, bar: Any) -> ShardArrays:
        """Label the samples [first, last). Batches never cross a shard, so a shard's bytes depend on nothing else."""
        samples = np.arange(first, last)
        shape = (len(samples), len(self.views), *self.grid)
        ids = np.empty((*shape, self.config.top_k), dtype=id_dtype)
        logits = np.empty((*shape, self.config.top_k), dtype=np.float32)
        confidence = np.empty(shape, dtype=np.float32)
        for view, views in enumerate(self.views):
            for batch in self.loader.epoch(0, views, sample_ids=samples):
                with autocast(self.device, self.amp):
                    token_logits = self.labeler(batch.images)[1]
                if not bool(torch.isfinite(token_logits).all()):
                    raise InputError(
                        f"the labeler gives logits that are not finite for pictures such as "
                        f"{self.beton.keys[int(batch.sample_ids[0])]!r}; are its weights whole?"
                    )
                rows = batch.sample_ids.cpu().numpy() - first
                for target, values in zip(
                    (ids, logits, confidence), top_k_labels(token_logits, self.config.top_k), strict=True
                ):
                    target[rows, view] = values.cpu().numpy().reshape(len(rows), *target.shape[2:])
                bar.update(len(rows))
        return ShardArrays(
            keys=[self.beton.keys[sample] for sample in samples],
            content_hash=self.beton.content_hashes[samples],
            class_id=self.class_map[self.beton.class_ids[samples]],
            views=np.ascontiguousarray(self.views[:, samples].transpose(1, 0, 2)),
            class_ids=ids,
            logits=logits,
            confidence=confidence,
        )


def _write_shards(job: _Job, writer: LabelSetWriter, shards: list[int], world: World) -> None:
    samples = sum(last - first for first, last in map(writer.shard_range, shards))
    with (
        progress_bar(samples * len(job.views), "labelling", enabled=world.is_first) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as background,
    ):
        # One shard is compressed and written while the next is labelled; never more than one waits.
        pending: concurrent.futures.Future[Any] | None = None
        for shard in shards:
            arrays = job.label(*writer.shard_range(shard), writer.spec.id_dtype, bar)
            if pending is not None:
                pending.result()
            pending = background.submit(writer.write_shard, shard, arrays)
        if pending is not None:
            pending.result()
