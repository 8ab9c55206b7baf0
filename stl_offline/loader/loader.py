"""Epochs of batches from a .beton: images under given views, with token targets where asked.

n: samples of the .beton; B: batch; H, W: image; N: tokens; m: targets a token.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.pipeline import Compiler, PipelineSpec

from stl_offline.errors import FormatError, InputError
from stl_offline.geometry import compose_views
from stl_offline.images.beton import Beton
from stl_offline.labels.cache import TokenCache
from stl_offline.loader.batch import Batch, ToDevice
from stl_offline.loader.decoder import ViewCrop
from stl_offline.loader.iterator import Epoch, EpochThread
from stl_offline.loader.order import check_shares, count_batches, rank_batches, shuffled
from stl_offline.loader.threads import torch_threads_kept, usable_workers
from stl_offline.loader.token_op import TokenDraw
from stl_offline.targets import TokenTargets

_BATCHES_AHEAD = 2
# Views are float32: an edge this far outside the image is on it.
_VIEW_TOLERANCE = 1e-4


class TokenLoader:
    """Loads a .beton through FFCV's compiled pipelines.

    Args:
        beton: the packed images.
        image_size: (H, W) of the images handed out.
        batch_size: B; the last batch of an epoch may be smaller.
        workers: loading threads; no more than numba may start (normally the cores) are used.
        seed: of the order and of drawn token targets.
        device: where batches go.
        mean, std: of the normalisation, per channel, for pixels in [0, 1].
        shuffle: a new order each epoch, from (seed, epoch) alone; else the .beton's order.
        drop_last: leave the last, smaller batch out.
        tokens: what token targets to give; needs ``cache``.
        cache: the labels, in the .beton's order; or several, of which each sample reads one.
        rank, world_size: this process and how many share the samples.
        interpolation: "area", "bilinear" or "bicubic" (`stl_offline.loader.decoder.resample`).

    Raises:
        InputError: an argument that cannot be used, or a cache that belongs to another .beton.
        FormatError: the .beton is shorter than its own table says.
    """

    def __init__(
        self,
        beton: Beton,
        image_size: tuple[int, int],
        batch_size: int,
        *,
        workers: int,
        seed: int,
        device: torch.device | str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        shuffle: bool = True,
        drop_last: bool = False,
        tokens: TokenTargets | None = None,
        cache: TokenCache | Sequence[TokenCache] | None = None,
        rank: int = 0,
        world_size: int = 1,
        interpolation: str = "area",
    ) -> None:
        if batch_size < 1 or min(image_size) < 1:
            raise InputError(f"batch size and image size must be positive, got {batch_size} and {image_size}")
        if not 0 <= rank < world_size:
            raise InputError(f"the rank must lie in 0 … {world_size - 1}, got {rank}")
        caches = () if cache is None else tuple(cache) if isinstance(cache, Sequence) else (cache,)
        if (tokens is None) != (not caches):
            raise InputError("token targets need both what to give (tokens) and labels (cache)")
        for one in caches:
            if len(one.labelled) != len(beton):
                raise InputError(
                    f"the token cache is of {len(one.labelled):,} samples, {beton.path} of {len(beton):,}: "
                    "join them anew"
                )
            if one.num_classes != caches[0].num_classes:
                raise InputError(f"token caches of {caches[0].num_classes} and of {one.num_classes} classes cannot mix")
        check_shares(len(beton), batch_size, world_size, drop_last)
        if min(std) <= 0:
            raise InputError(f"std must be positive, got {tuple(std)}")
        _check_size(beton)
        self.beton = beton
        self.image_size = (int(image_size[0]), int(image_size[1]))
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.tokens = tokens
        self._shuffle, self._drop_last = shuffle, drop_last
        self._rank, self._world_size = rank, world_size
        self._to_device = ToDevice(self.device, self.image_size[1], mean, std)
        self._thread: EpochThread | None = None
        self._views: np.ndarray | None = None
        self._warps: np.ndarray | None = None
        self._epoch = 0
        workers = usable_workers(workers)
        self._crop = ViewCrop(self.image_size, workers, beton, interpolation)
        pipelines: dict[str, Any] = {
            "image": PipelineSpec("image", self._crop),
            "class_id": None,
            "key_hash": None,
            "content_hash": None,
        }
        self._draw = None
        if tokens is not None:
            self._draw = TokenDraw(tokens, caches, workers, seed)
            pipelines["class_id"] = PipelineSpec("class_id", self._draw)
        # The operations call code that this package has compiled, and that numba keeps on disk. FFCV would compile its
        # part anew for every loader.
        with torch_threads_kept(), _compiler_off():
            self._ffcv = Loader(
                str(beton.path),
                batch_size,
                num_workers=workers,
                os_cache=True,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=_BATCHES_AHEAD,
            )
        # Allocated once: epochs take turns with them, as only one is alive at a time.
        self._buffers = self._ffcv.graph.allocate_memory(batch_size, _BATCHES_AHEAD + 2)

    def __len__(self) -> int:
        """Batches of one epoch for this rank."""
        return count_batches(len(self.beton), self.batch_size, self._world_size, self._drop_last)

    def epoch(
        self,
        epoch: int,
        views: np.ndarray,
        *,
        warps: np.ndarray | None = None,
        map_index: np.ndarray | None = None,
        cache_index: np.ndarray | None = None,
        start_batch: int = 0,
        sample_ids: np.ndarray | None = None,
    ) -> Epoch:
        """Start one epoch; batches are loaded ahead from now on. An epoch that is still running is closed.

        Args:
            epoch: its number, from 0: sets the order and what token targets draw.
            views: float32 (n, 6): every sample's view, by sample id; axis-aligned crops inside the image.
            warps: float32 (n, 6): how each sample's pixels are moved within its crop after loading, as a view of
                it. Targets are for the moved pixels; the batch carries its warps to whoever moves them.
            map_index: int64 (n,): which of its stored maps each sample's targets come from; the first by default.
            cache_index: int64 (n,): which of several caches; the first by default.
            start_batch: batches to leave out at the start, to go on in the middle of an epoch.
            sample_ids: these samples in this order instead of all.

        Returns:
            An iterator of `Batch`, with ``close()``; also a context manager.

        Raises:
            InputError: views, map_index or sample_ids do not fit; while iterating: an image that cannot be decoded.
            TrainingError: while iterating: the loading thread failed.
        """
        self.close()
        views = check_views(views, len(self.beton))
        shown = views
        if warps is not None:
            warps = np.ascontiguousarray(warps, dtype=np.float32)
            if warps.shape != views.shape or not np.isfinite(warps).all():
                raise InputError(f"warps must be finite numbers of the views' shape {views.shape}, got {warps.shape}")
            shown = compose_views(views, warps)
        if sample_ids is not None:
            order = np.asarray(sample_ids, dtype=np.int64)
            if order.ndim != 1 or (order.size and (order.min() < 0 or order.max() >= len(self.beton))):
                raise InputError(f"sample_ids must be one row of numbers in 0 … {len(self.beton) - 1}")
        elif self._shuffle:
            order = shuffled(self.seed, epoch, len(self.beton))
        else:
            order = np.arange(len(self.beton))
        batches = rank_batches(order, self.batch_size, self._rank, self._world_size, self._drop_last)
        if not 0 <= start_batch <= len(batches):
            raise InputError(f"start_batch must lie in 0 … {len(batches)}, got {start_batch}")
        self._crop.set_views(views)
        if self._draw is not None:
            self._draw.set_epoch(epoch, views, shown, map_index, cache_index)
        elif map_index is not None or cache_index is not None:
            raise InputError("map_index or cache_index was given to a loader without token targets")
        self._views, self._warps, self._epoch = shown, warps, epoch
        self._thread = EpochThread(self._ffcv, batches[start_batch:], self._buffers, self._check_batch)
        return Epoch(self._thread, self._make_batch)

    def close(self) -> None:
        """End the running epoch, if any."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None

    def _check_batch(self, ids: np.ndarray) -> None:
        broken = self._crop.take_broken()
        if broken is not None:
            raise InputError(
                f"{self.beton.path}: the image {self.beton.keys[broken]} (sample {broken}) cannot be decoded: "
                "the file is damaged; pack the images again"
            )

    def _make_batch(self, item: tuple[int, np.ndarray, tuple]) -> Batch:
        _, ids, (pixels, *tokens) = item
        to_device = self._to_device
        token_ids = token_weights = None
        if tokens:
            shape = (len(ids), self.tokens.tokens, self.tokens.columns)
            token_ids = to_device.copy(tokens[0][0].reshape(shape), torch.int64)
            token_weights = to_device.copy(tokens[0][1].reshape(shape), torch.float32)
        return Batch(
            images=to_device.images(pixels),
            class_ids=to_device.copy(self.beton.class_ids[ids], torch.int64),
            token_ids=token_ids,
            token_weights=token_weights,
            views=torch.from_numpy(self._views[ids]),
            warps=None if self._warps is None else torch.from_numpy(self._warps[ids]),
            epoch=self._epoch,
            sample_ids=to_device.copy(ids, torch.int64),
        )


def check_views(views: np.ndarray, samples: int) -> np.ndarray:
    """Views as the loader takes them: float32 (n, 6), each an axis-aligned crop within its image.

    Raises:
        InputError: another shape, or a view that rotates, shears, turns upside down, is empty or leaves the image.
    """
    views = np.ascontiguousarray(views, dtype=np.float32)
    if views.shape != (samples, 6):
        raise InputError(f"the loader needs a view for each of {samples:,} samples, ({samples}, 6); got {views.shape}")
    width, across, left, down, height, top = views.T.astype(np.float64)
    aligned = (across == 0) & (down == 0) & (width != 0) & (height > 0)
    ends = left + width
    low, high = -_VIEW_TOLERANCE, 1 + _VIEW_TOLERANCE
    inside = (np.minimum(left, ends) >= low) & (np.maximum(left, ends) <= high) & (top >= low) & (top + height <= high)
    # Comparisons with NaN are false, so numbers that are not finite fail here too.
    wrong = np.flatnonzero(~(aligned & inside))
    if wrong.size:
        example = wrong[0]
        reason = "is not an axis-aligned crop" if not aligned[example] else "leaves the image"
        raise InputError(
            f"the view of sample {example} {reason}: {views[example].tolist()} ({wrong.size:,} such views); "
            "the loader crops and mirrors, other transforms happen on the device"
        )
    return views


@contextlib.contextmanager
def _compiler_off() -> Iterator[None]:
    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(enabled)


def _check_size(beton: Beton) -> None:
    # Reading a mapped file past its end kills the process, so this must be known before.
    needed = int((beton.pointers + beton.sizes).max(initial=0))
    size = os.path.getsize(beton.path) if beton.path.exists() else 0
    if size < needed:
        raise FormatError(f"{beton.path} is cut off: {size:,} of at least {needed:,} bytes; pack the images again")
