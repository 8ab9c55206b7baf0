"""Images in memory, in place of packed ones: what a training run and a dump take, without FFCV and without decoding."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from stl_offline.config import TrainConfig
from stl_offline.distributed import World
from stl_offline.geometry import whole_views
from stl_offline.loader import Batch, count_batches, rank_batches, shuffled
from stl_offline.training.setup import Stage, build_stage


class MemoryImages(SimpleNamespace):
    """What the package reads of packed images, for n images of random pixels."""

    def __init__(self, n: int, side: int, classes: int) -> None:
        draw = np.random.default_rng(0)
        numbers = np.arange(n)
        super().__init__(
            place="memory",
            path="memory",
            keys=[f"{number:06d}" for number in numbers],
            class_names=tuple(f"class {number:04d}" for number in range(classes)),
            class_ids=draw.integers(0, classes, n),
            content_hashes=numbers.astype(np.uint64),
            heights=np.full(n, side),
            widths=np.full(n, side),
            fingerprint="memory",
            max_size=None,
        )

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def state(self) -> dict[str, object]:
        return {"fingerprint": self.fingerprint, "samples": len(self)}


class MemoryLoader:
    """Batches of random images that lie on the device, in an order and with views like `TokenLoader`'s; crops are not
    taken. targets: (ids, weights) of token targets, each (n, N, m), on the device; None: none."""

    def __init__(
        self,
        images: MemoryImages,
        side: int,
        batch_size: int,
        device: torch.device,
        *,
        world: World = World(),  # noqa: B008
        shuffle: bool = True,
        targets: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.images, self.batch_size, self.device, self.world, self.shuffle = images, batch_size, device, world, shuffle
        self.seed = 0
        pixels = torch.randn(len(images), 3, side, side, generator=torch.Generator().manual_seed(1))
        self.pixels = pixels.to(device, memory_format=torch.channels_last)
        self.class_ids = torch.from_numpy(images.class_ids).to(device)
        self.targets = targets

    @property
    def keys(self) -> list[str]:
        return self.images.keys

    def __len__(self) -> int:
        return count_batches(len(self.images), self.batch_size, self.world.size)

    def epoch(
        self,
        epoch: int,
        views: Any = None,
        *,
        start_batch: int = 0,
        sample_ids: Any = None,
        warps: Any = None,
        repeats: int = 1,
    ) -> "_Epoch":
        order = sample_ids
        if order is None:
            order = shuffled(self.seed, epoch, len(self.images)) if self.shuffle else np.arange(len(self.images))
        batches = rank_batches(order, self.batch_size, self.world)[start_batch:]
        return _Epoch(self._batch(epoch, ids, warps) for ids in batches)

    def _batch(self, epoch: int, ids: np.ndarray, warps: np.ndarray | None) -> Batch:
        start, end = int(ids[0]), int(ids[0]) + len(ids)
        # Consecutive images are a view without a copy, as a loader's batch is there already.
        rows = slice(start, end) if np.array_equal(ids, np.arange(start, end)) else torch.from_numpy(ids)
        if isinstance(rows, torch.Tensor) and self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device, non_blocking=True)
        tokens = (None, None) if self.targets is None else tuple(each[rows] for each in self.targets)
        return Batch(
            images=self.pixels[rows],
            class_ids=self.class_ids[rows],
            token_ids=tokens[0],
            token_weights=tokens[1],
            views=torch.from_numpy(whole_views(len(ids))),
            sample_ids=torch.from_numpy(np.array(ids, dtype=np.int64)),
            epochs=torch.full((len(ids),), epoch),
            warps=None if warps is None else torch.from_numpy(warps[ids]),
        )


class _Epoch:
    """An iterator that is a context manager, too."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    def __enter__(self) -> "_Epoch":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def make_stage(config: TrainConfig, name: str, n: int, classes: int, device: torch.device, world: World) -> Stage:
    """A stage of the package's own, on images in memory."""
    return build_stage(config, name, MemoryImages(n, config.img_size, classes), None, device, world)


def random_targets(
    n: int, tokens: int, m: int, classes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token targets of m classes with the weights of a softmax, as a loader gives them: ids and weights (n, N, m)."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, classes, (n, tokens, m), generator=generator)
    weights = torch.rand(n, tokens, m, generator=generator).softmax(dim=-1) if m > 1 else torch.ones(n, tokens, m)
    return ids.to(device), weights.to(device)
