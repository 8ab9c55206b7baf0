"""Batches of images with masks, decoded and cropped by threads, in an order that depends on the seed alone.

B: batch; H, W: crop.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_offline.distributed import World
from stl_offline.loader import ToDevice, count_batches, rank_batches, shuffled
from stl_offline.transfer.crops import DenseCrops, cut
from stl_offline.transfer.pairs import PairSet

_BATCHES_AHEAD = 2


@dataclass(frozen=True)
class PairBatch:
    """images: float32 (B, 3, H, W), normalised; masks: int64 (B, H, W), `stl_offline.transfer.pairs.NO_CLASS` where
    there is no class; sample_ids: int64 (B,), positions in the pairs; epoch: the one that the batch belongs to."""

    images: Tensor
    masks: Tensor
    sample_ids: Tensor
    epoch: int


class PairLoader:
    """Loads random crops of pairs.

    Args:
        pairs: the data set.
        crops: how crops are drawn.
        batch_size: B; the last batch of an epoch may be smaller.
        mean, std: of the images' normalisation, for pixels in [0, 1].
        workers: threads that decode and crop.
        seed: of order and crops; device: where batches go; world: this process among those that share the samples.
    """

    def __init__(
        self,
        pairs: PairSet,
        crops: DenseCrops,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        workers: int,
        seed: int,
        device: torch.device,
        world: World,
    ) -> None:
        rank_batches(np.arange(len(pairs)), batch_size, world)  # checks that every process gets its part
        self.pairs, self.crops, self.batch_size = pairs, crops, batch_size
        self.seed, self.device, self.world, self.workers = seed, device, world, workers
        self._to_device = ToDevice(device, crops.size[1], tuple(mean), tuple(std))
        red, green, blue = (round(255 * value) for value in mean)
        self._fill = (red, green, blue)
        self._sizes_n2 = np.array([(pair.height, pair.width) for pair in pairs.pairs], dtype=np.float64)

    @property
    def keys(self) -> Sequence[str]:
        """Every sample's key, by sample id."""
        return self.pairs.keys

    def __len__(self) -> int:
        """Batches of one epoch for this rank."""
        return count_batches(len(self.pairs), self.batch_size, self.world.size)

    def epoch(self, epoch: int, *, start_batch: int = 0) -> Iterator[PairBatch]:
        """The batches of one epoch from ``start_batch`` on, loaded ahead.

        Raises:
            InputError: while iterating: a file has changed since it was checked.
        """
        views = self.crops.draw(self.seed, epoch, self._sizes_n2)
        batches = rank_batches(shuffled(self.seed, epoch, len(self.pairs)), self.batch_size, self.world)[start_batch:]
        with ThreadPoolExecutor(self.workers) as pool:
            try:
                pending: deque[tuple[np.ndarray, list[Future]]] = deque()
                for ids in batches:
                    pending.append((ids, [pool.submit(self._cut, number, views[number]) for number in ids.tolist()]))
                    if len(pending) > _BATCHES_AHEAD:
                        yield self._batch(*pending.popleft(), epoch)
                while pending:
                    yield self._batch(*pending.popleft(), epoch)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, ids: np.ndarray, loaded: list[Future], epoch: int) -> PairBatch:
        images, masks = zip(*(each.result() for each in loaded), strict=True)
        return PairBatch(
            images=self._to_device.images(np.stack(images)),
            masks=torch.from_numpy(np.stack(masks)).to(self.device, torch.int64),
            sample_ids=torch.from_numpy(ids).to(self.device),
            epoch=epoch,
        )

    def _cut(self, number: int, view: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        image, mask = self.pairs.read(number)
        return cut(image, mask, view, self.crops.size, self._fill)
