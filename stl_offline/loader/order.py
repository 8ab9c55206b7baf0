"""In which order samples come, and which rank gets which: pure functions of the job's numbers.

n: samples; B: batch size of one rank.
"""

import itertools

import numpy as np

from stl_offline.compiled import njit
from stl_offline.distributed import World
from stl_offline.errors import InputError
from stl_offline.random import STREAM_ORDER, random_bits


def shuffled(seed: int, epoch: int, samples: int) -> np.ndarray:
    """A permutation of ``samples`` ids, int64 (n,), that depends on nothing but (seed, epoch, n)."""
    keys = np.empty(samples, dtype=np.uint64)
    _draw_keys(np.uint64(seed % 2**64), np.uint64(epoch), keys)
    return np.argsort(keys, kind="stable").astype(np.int64)


@njit
def _draw_keys(seed, epoch, keys):
    for sample_id in range(len(keys)):
        high, low, _, _ = random_bits(seed, STREAM_ORDER, epoch, sample_id, 0)
        keys[sample_id] = (np.uint64(high) << np.uint64(32)) | np.uint64(low)


def count_batches(samples: int, batch_size: int, world_size: int) -> int:
    """Batches that every rank gets."""
    together = batch_size * world_size
    return -(-samples // together)


def check_shares(samples: int, batch_size: int, world_size: int, repeats: int = 1) -> None:
    """Whether every rank can have its part of every step.

    repeats: crops of each image in a batch; an epoch then has 1 / repeats of the samples.

    Raises:
        InputError: there are fewer samples than ranks, or single-sample batches that do not come out even.
    """
    steps = count_batches(samples, batch_size, world_size)
    if samples // repeats < steps * world_size:
        size = f"{batch_size} with {repeats} crops of an image" if repeats > 1 else f"{batch_size}"
        raise InputError(
            f"{samples} images cannot give each of {world_size} processes {steps} batches of up to {size}: "
            "use fewer processes, more images, or another batch size"
        )


def rank_batches(order: np.ndarray, batch_size: int, world: World, steps: int | None = None) -> list[np.ndarray]:
    """One rank's batches of an order of sample ids, each int64 (≤ B,).

    Step i of all ranks together takes the i-th ``batch_size · world_size`` samples of the order, so what the ranks
    see together is what one rank with the joint batch size sees. Every rank gets the same number of batches, none of
    them empty (ranks that step together must not wait for each other in vain), and no sample comes twice: the last,
    partial step is shared evenly.

    Args:
        steps: how many, where that may be one more than the samples fill.

    Raises:
        InputError: as `check_shares`.
    """
    together = batch_size * world.size
    order = np.asarray(order, dtype=np.int64)
    if steps is None:
        check_shares(len(order), batch_size, world.size)
        steps = count_batches(len(order), batch_size, world.size)
    if steps == 0:
        return []
    starts = np.arange(steps + 1) * together
    starts[-1] = min(starts[-1], len(order))
    # A last step with fewer samples than ranks would leave a rank without: it takes some of the step before.
    if steps > 1 and starts[-1] - starts[-2] < world.size:
        starts[-2] = starts[-1] - world.size
    return [
        np.ascontiguousarray(np.array_split(order[start:end], world.size)[world.rank])
        for start, end in itertools.pairwise(starts)
    ]
