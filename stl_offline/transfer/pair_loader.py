"""Batches for dense prediction, read by threads, in an order that depends on the seed alone.

`ThreadedLoader` is what images with masks (`PairLoader`) and with boxes share.

B: batch; H, W: crop.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stl_offline.device import upload
from stl_offline.distributed import World
from stl_offline.loader import ToDevice, count_batches, rank_batches, shuffled
from stl_offline.transfer.crops import DenseCrops, cut
from stl_offline.transfer.pairs import PairSet

_BATCHES_AHEAD = 2
_IMAGES_AHEAD = 4


def read_ahead(read: Callable[[int], Any], numbers: Sequence[int], workers: int) -> Iterator[Any]:
    """``read(number)`` of each number, in order, by ``workers`` threads, some images ahead."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            pending = deque(pool.submit(read, number) for number in numbers[:_IMAGES_AHEAD])
            for place in range(len(numbers)):
                if place + _IMAGES_AHEAD < len(numbers):
                    pending.append(pool.submit(read, numbers[place + _IMAGES_AHEAD]))
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class ThreadedLoader(ABC):
    """Loads samples in batches, each epoch in an order of its own; what a sample is, subclasses define.

    Args:
        keys: every sample's key, by sample id.
        batch_size: B; the last batch of an epoch may be smaller.
        workers: threads that load.
        seed: of the order; device: where batches go; world: this process among those that share the samples.

    Raises:
        InputError: there are fewer samples than processes.
    """

    def __init__(
        self, keys: Sequence[str], batch_size: int, *, workers: int, seed: int, device: torch.device, world: World
    ) -> None:
        rank_batches(np.arange(len(keys)), batch_size, world)  # checks that every process gets its part
        self.keys, self.batch_size = keys, batch_size
        self.seed, self.device, self.world, self.workers = seed, device, world, workers

    def __len__(self) -> int:
        """Batches of one epoch for this rank."""
        return count_batches(len(self.keys), self.batch_size, self.world.size)

    @abstractmethod
    def draw(self, epoch: int) -> Sequence[Any]:
        """What is drawn for each sample in an epoch: what `load` gets."""

    @abstractmethod
    def load(self, number: int, drawn: Any) -> Any:
        """One sample; called in a thread."""

    @abstractmethod
    def collate(self, ids: np.ndarray, loaded: list[Any], epoch: int) -> Any:
        """A batch of loaded samples, with ``sample_ids``."""

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[Any]:
        """The batches of one epoch from ``start_batch`` on, loaded ahead.

        Raises:
            InputError: while iterating: a file has changed since it was checked.
        """
        drawn = self.draw(epoch)
        batches = rank_batches(shuffled(self.seed, epoch, len(self.keys)), self.batch_size, self.world)[start_batch:]
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                pending: deque[tuple[np.ndarray, list[Future]]] = deque()
                for ids in batches:
                    pending.append((ids, [pool.submit(self.load, number, drawn[number]) for number in ids.tolist()]))
                    if len(pending) > _BATCHES_AHEAD:
                        yield self._next(pending, epoch)
                while pending:
                    yield self._next(pending, epoch)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _next(self, pending: deque[tuple[np.ndarray, list[Future]]], epoch: int) -> Any:
        ids, futures = pending.popleft()
        return self.collate(ids, [each.result() for each in futures], epoch)


@dataclass(frozen=True)
class PairBatch:
    """images: float32 (B, 3, H, W), normalised; masks: int64 (B, H, W), `stl_offline.transfer.pairs.NO_CLASS` where
    there is no class; sample_ids: int64 (B,), positions in the pairs, on the CPU; epoch: the one that the batch belongs
    to."""

    images: Tensor
    masks: Tensor
    sample_ids: Tensor
    epoch: int


class PairLoader(ThreadedLoader):
    """Loads random crops of pairs.

    Args:
        pairs: the data set; crops: how crops are drawn.
        mean, std: of the images' normalisation, for pixels in [0, 1].
        settings: the other arguments of `ThreadedLoader`.
    """

    def __init__(
        self,
        pairs: PairSet,
        crops: DenseCrops,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        **settings: Any,
    ) -> None:
        super().__init__(pairs.keys, batch_size, **settings)
        self.pairs, self.crops = pairs, crops
        self._to_device = ToDevice(self.device, crops.size[1], tuple(mean), tuple(std))
        red, green, blue = (round(255 * value) for value in mean)
        self._fill = (red, green, blue)
        self._sizes_n2 = np.array([(pair.height, pair.width) for pair in pairs.pairs], dtype=np.float64)

    def draw(self, epoch: int) -> np.ndarray:
        """Every sample's view: float64 (n, 6)."""
        return self.crops.draw(self.seed, epoch, self._sizes_n2)

    def load(self, number: int, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.pairs.read(number)
        return cut(image, mask, drawn, self.crops.size, self._fill)

    def collate(self, ids: np.ndarray, loaded: list[tuple[np.ndarray, np.ndarray]], epoch: int) -> PairBatch:
        images, masks = zip(*loaded, strict=True)
        return PairBatch(
            images=self._to_device.images(np.stack(images)),
            masks=upload(np.stack(masks), self.device, torch.int64),
            sample_ids=torch.from_numpy(ids),
            epoch=epoch,
        )
