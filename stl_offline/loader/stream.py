"""Batches of images that are not packed: threads read each image where it lies, in a tar or a folder.

B: batch; H, W: image.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from stl_offline.images.unpacked import UnpackedImages
from stl_offline.loader.iterator import BATCHES_AHEAD, BatchThread
from stl_offline.loader.loader import TokenLoader

# Reading waits for disks more than it works.
_READERS = 8


class StreamLoader(TokenLoader):
    """`TokenLoader` for images that are not packed; its batches are the same, bit for bit."""

    beton: UnpackedImages

    def _open(self) -> None:
        self._decode = self._crop.generate_code()
        self._label = None if self._draw is None else self._draw.generate_code()
        slots = BATCHES_AHEAD + 2
        self._pixels = self._buffer((slots, self.batch_size, *self.image_size, 3), torch.uint8)
        self._targets = []
        if self._draw is not None:
            shape = (slots, self.batch_size, *self.tokens.grid, self._targets_per_token)
            self._targets = [self._buffer(shape, torch.int32), self._buffer(shape, torch.float32)]

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """Memory that batches are copied to the device from: pinned, as FFCV's is, where that is a GPU."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda").numpy()

    def _load(self, batches: list[np.ndarray]) -> BatchThread:
        # What is read: each image once, whatever the number of its crops.
        images = [self.samples_of(ids[:: self._crop.repeats]) for ids in batches]
        return _StreamThread(batches, images, self._check_batch, self.beton.stored_bytes, self._fill)

    def _fill(self, ids: np.ndarray, slot: int, stored: list[bytes]) -> tuple:
        """Pixels and token targets of a batch whose images' bytes are there."""
        count = len(ids)
        sizes = np.array([len(data) for data in stored], dtype=np.int64)
        self._crop.set_pointers(self.samples_of(ids[:: self._crop.repeats]), np.cumsum(sizes) - sizes)
        storage = np.frombuffer(b"".join(stored), dtype=np.uint8)
        pixels = self._decode(ids, self._pixels[slot, :count], None, (storage,))
        if self._label is None:
            return (pixels,)
        return pixels, self._label(ids, tuple(each[slot, :count] for each in self._targets), None, None)


class _StreamThread(BatchThread):
    """Reads the next batches' bytes by threads while a batch is decoded."""

    def __init__(
        self,
        batches: list[np.ndarray],
        images: list[np.ndarray],
        check: Callable[[np.ndarray], None],
        read: Callable[[int], bytes],
        fill: Callable[[np.ndarray, int, list[bytes]], tuple],
    ) -> None:
        super().__init__(batches, check)
        self._images, self._read, self._fill = images, read, fill
        self._pending: list[list[Future]] = []
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="stl-offline-reader")

    def run(self) -> None:
        with self._pool:
            super().run()
            for futures in self._pending:
                for each in futures:
                    each.cancel()

    def load(self, number: int, ids: np.ndarray, slot: int) -> tuple:
        for ahead in self._images[number + len(self._pending) : number + 1 + BATCHES_AHEAD]:
            self._pending.append([self._pool.submit(self._read, sample) for sample in ahead.tolist()])
        stored = [each.result() for each in self._pending.pop(0)]
        return self._fill(ids, slot, stored)
