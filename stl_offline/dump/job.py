"""The dump job. Processes divide the shards; each shard is encoded and written while the next one is labelled."""

import concurrent.futures
import contextlib
import logging
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.distributed import World, barrier, join_world, leaving_world, sum_over_world, told_by_first
from stl_offline.dump.labelling import Labelling, load_labeler
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.store import open_storage
from stl_offline.labels.writer import LabelSetWriter, check_place
from stl_offline.progress import progress_bar

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class DumpReport:
    """Result of a dump job: ``labelled`` images in this run by all its processes, of ``samples`` in the set.

    ``is_first``: whether this is the process that reports for the job.
    """

    path: str
    samples: int
    labelled: int
    seconds: float
    bytes: int
    is_first: bool = True


def dump_labels(config: DumpConfig) -> DumpReport:
    """Write a label set, or continue one that a killed job left. Under torchrun, as one of the job's processes.

    Raises:
        StlError: bad input, or a folder that belongs to another job; or another process of this job has failed.
    """
    device = pick_device(config.device)
    # The processes exchange only counts and names, so gloo serves on GPUs, too.
    world = join_world(device, "gloo")
    with leaving_world():
        # What can be refused without the images is refused before they are packed, which may take hours.
        labeler = load_labeler(config)
        check_place(config.out)
        beton = ensure_beton(config.data, skip_broken=config.skip_broken)
        labelling = Labelling(config, labeler, beton, device)
        started = time.perf_counter()
        with _open_together(config.out, labelling.spec, labelling.num_shards, world) as (writer, shards):
            _write_shards(labelling, writer, shards, world)
            labelled = sum(last - first for first, last in map(writer.shard_range, shards))
            # All shards are done once every process has come to this sum.
            labelled = int(sum_over_world(torch.tensor([labelled]), world))
            if world.is_first:
                size = sum(shard.bytes for shard in writer.finish().shards)
            size = told_by_first(size if world.is_first else None, world)
        seconds = time.perf_counter() - started
        return DumpReport(str(config.out), len(labelling.beton), labelled, seconds, size, world.is_first)


@contextlib.contextmanager
def _open_together(
    path: str, spec: LabelSpec, num_shards: int, world: World
) -> Iterator[tuple[LabelSetWriter, list[int]]]:
    """The writer, and this process's shards: every n-th of those that are not done."""
    job = told_by_first(secrets.token_hex(8), world)
    with contextlib.ExitStack() as stack:
        writer = LabelSetWriter(path, spec, num_shards, job=job)
        # The first takes the folder, or finds that it may not; only then do the others come.
        if world.is_first:
            stack.enter_context(writer)
        missing = told_by_first(writer.missing() if world.is_first else None, world)
        if not world.is_first:
            stack.enter_context(writer)
        barrier(world)
        yield writer, missing[world.rank :: world.size]


def _write_shards(labelling: Labelling, writer: LabelSetWriter, shards: list[int], world: World) -> None:
    """Label, encode and write ``shards``; one is encoded and written while the next is labelled."""
    if not shards:
        return
    views = len(labelling.views)
    samples = [np.arange(*writer.shard_range(shard)) for shard in shards]
    total = sum(map(len, samples))
    name = "labelling" if world.size == 1 else f"labelling (process 1 of {world.size})"
    with (
        progress_bar(total * views, name, "map" if views > 1 else "image", enabled=world.is_first) as bar,
        concurrent.futures.ThreadPoolExecutor(1) as background,
    ):
        size = _Size(writer.place, total, bar)
        pending: concurrent.futures.Future[Any] | None = None
        for shard, ids in zip(shards, samples, strict=True):
            arrays = labelling.label(ids, bar.update)
            # Never more than one waits.
            if pending is not None:
                size.add(pending.result())
            pending = background.submit(writer.write_shard, shard, arrays)
        size.add(pending.result())


class _Size:
    """Bytes written so far, and the expected total."""

    def __init__(self, place: str, samples: int, bar: Any) -> None:
        self._place, self._samples, self._bar = place, samples, bar
        self._done = self._bytes = 0

    def add(self, record: Any) -> None:
        first = not self._done
        self._done += record.samples
        self._bytes += record.bytes
        expected = self._bytes * self._samples // self._done
        self._bar.set_postfix_str(f"{self._bytes / 1e6:,.1f} of {expected / 1e6:,.1f} MB", refresh=False)
        free = open_storage(self._place).free_bytes()
        if first and free is not None and free < expected - self._bytes:
            _LOGGER.warning(
                "the shards still to be written need %.2f GB, but %s has %.2f GB free",
                (expected - self._bytes) / 1e9,
                self._place,
                free / 1e9,
            )
