"""A dump on a Ray cluster: actors hold the labeler, and the driver gives them one shard after another.

One actor runs per GPU, or per CPU where the device is a CPU. Nodes may come and go: a shard whose actor is lost goes to
another one, and new resources get actors of their own. Shards are committed as every worker commits them, so a shard
that is labelled twice does no harm, and plain workers may run beside.
"""

import importlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.dump.job import DumpReport
from stl_offline.dump.labelling import Labelling, load_labeler
from stl_offline.dump.tars import TarLabelling, prepare
from stl_offline.errors import InputError, MissingExtraError, StlError, TargetError
from stl_offline.labels.hub import is_hub
from stl_offline.labels.writer import check_place
from stl_offline.progress import progress_bar

_LOGGER = logging.getLogger(__name__)
# How often the driver looks for ended shards, and for resources that have come.
_POLL_SECONDS = 1.0
# A shard that was lost with its actor so many times is not bad luck.
_TRIES = 20
# For how long a place stays empty where an actor could not start.
_PAUSE_SECONDS = 60.0


class ShardActor:
    """Holds a labeler and its images in a process of the cluster."""

    def __init__(self, config: DumpConfig) -> None:
        self._labelling = _prepare(config, pick_device(config.device))

    def ready(self) -> None:
        """Do nothing, once the labeler is there."""

    def write(self, shard: int) -> int:
        """Label and commit a shard; gives its number of images."""
        labelling = self._labelling
        with labelling.open_writer() as writer:
            if writer.is_done(shard):
                return 0
            arrays = labelling.label_shard(writer, shard, lambda done: None)
            writer.write_shard(shard, arrays)
            return len(arrays)


def dump_on_ray(config: DumpConfig, address: str | None = None) -> DumpReport:
    """`dump_labels` by the actors of a Ray cluster. Each node must read the images and the labeler under these names.

    Args:
        address: of a cluster that runs, such as ``auto`` or ``ray://head:10001``; None: a new one on this machine.

    Raises:
        StlError: as `dump_labels`; or a cluster that cannot be reached, or a shard that is lost again and again.
    """
    ray = _ray()
    if is_hub(config.out):
        raise InputError(
            f"workers of several machines cannot share {config.out}; use a bucket, and push the set from it"
        )
    if config.device.startswith("cuda:"):
        raise InputError(f"each worker takes the GPU that Ray gives it, got {config.device}; give `device=cuda`")
    # What can be refused is refused here, before the cluster works.
    labelling = _prepare(config, torch.device("cpu"))
    started = time.perf_counter()
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"there is no Ray cluster at {address}: {' '.join(str(error).split())[:200]}") from error
    try:
        with labelling.open_writer() as writer:
            was_complete = writer.complete
            shards = writer.todo()
            images = labelling.images_of(writer, shards)
            labelled = 0
            with progress_bar(images, "labelling", "image") as bar:
                for count in _run(ray, config, shards):
                    labelled += count
                    bar.update(count)
            manifest = writer.finish()
    finally:
        if own:
            ray.shutdown()
    seconds = time.perf_counter() - started
    size = sum(shard.bytes for shard in manifest.shards)
    return DumpReport(str(config.out), manifest.spec.num_samples, labelled, seconds, size, was_complete=was_complete)


def _run(ray: ModuleType, config: DumpConfig, shards: list[int]) -> Iterator[int]:
    """Have all shards written; gives the number of images of each that is."""
    has_gpu = config.device != "auto" or "GPU" in ray.cluster_resources()
    resource = "GPU" if config.device != "cpu" and has_gpu else "CPU"
    share = {"num_cpus": 1} if resource == "CPU" else {"num_gpus": 1}
    actor_class = ray.remote(max_restarts=0, **share)(ShardActor)
    if not ray.cluster_resources().get(resource):
        _LOGGER.warning("the cluster has no %s now; waiting for one", resource)
    waiting = deque(shards)
    tries = dict.fromkeys(shards, 0)
    starting: dict[Any, Any] = {}  # actors by what tells that they are ready: until then they may have no place
    idle: list[Any] = []
    running: dict[Any, tuple[Any, int]] = {}
    has_started, failed_starts = False, 0
    blocked: deque[float] = deque()  # until when
    while waiting or running:
        # As many actors as the cluster has places for now, and one more while shards wait: a cluster that starts nodes
        # on demand sees none otherwise. Those of nodes that are gone have ended with an error.
        while blocked and blocked[0] < time.monotonic():
            blocked.popleft()
        places = int(ray.cluster_resources().get(resource, 0)) + bool(waiting) - len(blocked)
        wanted = min(places, len(waiting) + len(running)) - len(idle) - len(running) - len(starting)
        for _ in range(wanted):
            actor = actor_class.remote(config)
            starting[actor.ready.remote()] = actor
        while idle and waiting:
            actor, shard = idle.pop(), waiting.popleft()
            tries[shard] += 1
            running[actor.write.remote(shard)] = actor, shard
        tasks = [*starting, *running]
        ended, _ = ray.wait(tasks, num_returns=1, timeout=_POLL_SECONDS) if tasks else ([], [])
        if not tasks:
            time.sleep(_POLL_SECONDS)
        for task in ended:
            actor, shard = running.pop(task, (starting.pop(task, None), None))
            try:
                found = ray.get(task)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, StlError) else error) from error
            except ray.exceptions.RayError as error:
                # The actor, or its node, is gone, or could not start there.
                if shard is None:
                    failed_starts += 1
                    # Others that are still starting may be on better nodes: a bad one fails first.
                    may_start = has_started or starting
                    fails_everywhere = getattr(error, "actor_init_failed", False) and not may_start
                    if fails_everywhere or failed_starts >= _TRIES:
                        raise TargetError(f"no worker can be started: {_last_line(error)}") from error
                    _LOGGER.warning("a worker could not be started: %s", _last_line(error))
                    blocked.append(time.monotonic() + _PAUSE_SECONDS)
                    continue
                if tries[shard] >= _TRIES:
                    raise TargetError(f"shard {shard} was lost with its actor {_TRIES} times: {error}") from error
                waiting.append(shard)
                continue
            has_started, failed_starts = True, 0
            idle.append(actor)
            if shard is not None:
                yield found


def _last_line(error: Exception) -> str:
    """What an exception of a worker's says last: the cause, below its traceback."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _prepare(config: DumpConfig, device: torch.device) -> Labelling | TarLabelling:
    labeler = load_labeler(config)
    check_place(config.out)
    return prepare(config, labeler, device)


def _ray() -> ModuleType:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError("`engine=ray` needs the extra [ray]: pip install 'stl-offline[ray]'") from error
