"""Estimates the time and size of a dump from a few of the images. Writes nothing."""

import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.distributed import World, join_world, leaving_world, sum_over_world
from stl_offline.dump.labelling import Labelling, check_shards, load_labeler, pick_shards
from stl_offline.dump.tars import TarLabelling, streamed_tars
from stl_offline.images.beton import Beton
from stl_offline.images.classes import read_class_map
from stl_offline.images.pack import find_packed, pack_sample
from stl_offline.labels.arrays import ShardArrays, select
from stl_offline.labels.card import make_card
from stl_offline.labels.format import encode_shard
from stl_offline.labels.hub import is_hub
from stl_offline.labels.manifest import Manifest, ShardRecord, shard_name, shard_range
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.store import open_storage
from stl_offline.labels.views_ahead import run_bytes
from stl_offline.models import TokenLabeler
from stl_offline.remote import BLOCK_BYTES, is_address, is_web, remote_size

# A first batch warms up; then as many batches are measured as fit into the seconds, within the limits.
_SECONDS = 10.0
_FEWEST, _MOST = 3, 32
# Numbers of workers for which a job is priced.
WORKERS = (1, 8, 64)
# To an object store, of a shard; docs/scale.md lists them.
_SHARD_REQUESTS = 10
_TAR_BLOCK = 512
# Files of a store that are looked at at the same time.
_LOOKS = 16


@dataclass(frozen=True)
class DumpEstimate:
    """The cost of a dump, extrapolated from ``measured`` images to the whole data set.

    images, views (of each), shards: what the label set would hold; bytes: all its files; cache_bytes: the most that
    its token caches take at a time on a machine that trains from it; images_per_second, seconds: of the job with
    ``processes`` processes; pack_seconds: before that, for images that are not packed yet; free_bytes: where the set
    would be written (None for an object store); hours: of the job by each number of workers in `WORKERS`, each as fast
    as one that was measured; read_bytes: of tars that are streamed; requests: to the stores that the set is written to
    and the tars are read from (0 for folders, and for the Hugging Face hub, to which a finished set is pushed).
    """

    images: int
    views: int
    shards: int
    bytes: int
    cache_bytes: int
    bytes_per_image: float
    images_per_second: float
    seconds: float
    pack_seconds: float
    processes: int
    measured: int
    free_bytes: int | None
    hours: dict[int, float]
    read_bytes: int
    requests: int
    is_first: bool = True

    @property
    def fits(self) -> bool:
        """Whether the set fits where it would be written."""
        return self.free_bytes is None or self.bytes < self.free_bytes


def estimate_dump(config: DumpConfig) -> DumpEstimate:
    """Label and encode a few images to estimate the cost of the whole dump. Leaves no files, not even packed images.
    Under torchrun all processes measure at the same time, as they would during the dump.

    Raises:
        StlError: what `stl_offline.dump.dump_labels` would raise before it writes.
    """
    device = pick_device(config.device)
    world = join_world(device, "gloo")
    with leaving_world():
        labeler = load_labeler(config)
        tars = streamed_tars(config)
        if tars is not None:
            return _measure_tars(config, labeler, tars, device, world)
        class_map = None if config.class_map is None else read_class_map(config.class_map)
        packed = find_packed(config.data, skip_broken=config.skip_broken, class_map=class_map)
        if packed is not None:
            return _measure(config, labeler, packed, len(packed), 0.0, device, world)
        with tempfile.TemporaryDirectory(prefix="stl-offline-") as folder:
            started = time.perf_counter()
            most = _MOST * config.batch_size
            beton, images = pack_sample(config.data, most, folder, skip_broken=config.skip_broken, class_map=class_map)
            seconds = (time.perf_counter() - started) / len(beton) * images / len(os.sched_getaffinity(0))
            return _measure(config, labeler, beton, images, seconds, device, world)


def _measure_tars(
    config: DumpConfig, labeler: TokenLabeler, tars: Sequence[str], device: torch.device, world: World
) -> DumpEstimate:
    """Of tars that are streamed: the first images of the first one stand for all."""
    labelling = TarLabelling(config, labeler, tars, device)
    with ThreadPoolExecutor(_LOOKS) as pool:
        size = sum(pool.map(lambda tar: remote_size(tar) if is_address(tar) else os.path.getsize(tar), tars))
    with (
        tempfile.TemporaryDirectory(prefix="stl-offline-") as folder,
        closing(labelling.chunks(tars[0], Path(folder), _MOST)) as chunks,
    ):
        started = time.perf_counter()
        beton = next(chunks)
        seconds = (time.perf_counter() - started) / len(beton)
        # Each file of a tar has a header and is filled up to whole blocks; labels beside images are left out.
        each = float(np.mean(-(-beton.sizes // _TAR_BLOCK) * _TAR_BLOCK + _TAR_BLOCK))
        images = max(len(tars), round(size / each))
        found = _measure(config, labeler, beton, images, 0.0, device, world, len(tars))
    # Tars are read and checked while labels are made: the slower of both counts.
    rate = min(found.images_per_second, world.size / seconds)
    reads = 0
    if is_address(tars[0]):
        reads = len(tars) if is_web(tars[0]) else -(-size // BLOCK_BYTES)
    return replace(
        found,
        images_per_second=rate,
        seconds=images / rate,
        hours=_hours(images * world.size / rate, len(tars)),
        read_bytes=size,
        requests=found.requests + reads,
    )


def _hours(seconds: float, shards: int) -> dict[int, float]:
    """Hours that each of `WORKERS` takes for what one does in ``seconds``. None has less than a shard to do."""
    return {workers: seconds / shards * -(-shards // workers) / 3600 for workers in WORKERS}


def _measure(
    config: DumpConfig,
    labeler: TokenLabeler,
    beton: Beton,
    images: int,
    pack_seconds: float,
    device: torch.device,
    world: World,
    shards: int = 0,
) -> DumpEstimate:
    check_shards(config.shards, images)
    # One shard, since the whole set may have more shards than there are measured images.
    labelling = Labelling(replace(config, shards=1), labeler, beton, device)
    views = len(labelling.views)
    _label(labelling, config.batch_size)
    _, first = _label(labelling, config.batch_size)
    batches = int(min(max(_SECONDS / first, _FEWEST), _MOST))
    arrays, seconds = _label(labelling, max(2, batches * config.batch_size // views))
    started = time.process_time()
    whole = len(encode_shard(arrays, labelling.spec))
    encoding = (time.process_time() - started) / len(arrays)
    shards = shards or config.shards or pick_shards(images, config.crops_per_image)
    # Two sizes give the bytes per image and the bytes that each shard adds; the smaller one is a real shard's size.
    few = select(arrays, slice(max(1, min(len(arrays) // 2, images // shards))))
    part = len(encode_shard(few, labelling.spec))
    each = (whole - part) / (len(arrays) - len(few)) if len(few) < len(arrays) else float(whole)
    size = round(each * images + max(0.0, whole - each * len(arrays)) * shards)
    size += _size_of_the_rest(labelling.spec, images, shards)
    one = seconds / len(arrays)
    if device.type == "cpu":
        # Encoding runs in parallel with labelling, but on the same cores.
        one += encoding / len(os.sched_getaffinity(0))
    rate = float(sum_over_world(torch.tensor([1 / max(one, encoding)], dtype=torch.float64), world))
    return DumpEstimate(
        images=images,
        views=views,
        shards=shards,
        bytes=size,
        cache_bytes=run_bytes(labelling.spec, images),
        bytes_per_image=size / images,
        images_per_second=rate,
        seconds=images / rate,
        pack_seconds=pack_seconds,
        processes=world.size,
        measured=len(arrays),
        free_bytes=open_storage(config.out).free_bytes(),
        hours=_hours(images * world.size / rate, shards),
        read_bytes=0,
        requests=_SHARD_REQUESTS * shards if is_address(config.out) and not is_hub(config.out) else 0,
        is_first=world.is_first,
    )


def _label(labelling: Labelling, count: int) -> tuple[ShardArrays, float]:
    """The labels of some images, spread over the data set, and the seconds that they took."""
    samples = np.unique(np.linspace(0, len(labelling.beton) - 1, min(count, len(labelling.beton))).astype(np.int64))
    started = time.perf_counter()
    arrays = labelling.label(samples, lambda done: None)
    return arrays, time.perf_counter() - started


def _size_of_the_rest(spec: LabelSpec, images: int, shards: int) -> int:
    """Bytes of the manifest and the card of a set of that size."""
    spec = replace(spec, source=spec.source | {"samples": images})
    records = []
    for index in range(shards):
        first, last = shard_range(index, shards, images)
        name = shard_name(index, shards, spec.container)
        records.append(ShardRecord(name, first, last - first, 1_000_000, "0" * 64))
    manifest = Manifest(spec, tuple(records))
    return len(manifest.to_bytes()) + len(make_card(manifest))
