"""Epochs of batches from a .beton: images under given views, with token targets where asked.

n: samples of the .beton; B: batch; H, W: image; N: tokens; m: targets per token.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from ffcv.loader import Loader
from ffcv.pipeline import Compiler, PipelineSpec, graph

from stl_offline.config import INTERPOLATIONS
from stl_offline.distributed import World
from stl_offline.errors import FormatError, InputError
from stl_offline.geometry import compose_views
from stl_offline.images.beton import Beton
from stl_offline.loader.batch import Batch, ToDevice
from stl_offline.loader.decoder import ViewCrop
from stl_offline.loader.iterator import BATCHES_AHEAD, BatchThread, Epoch, EpochThread
from stl_offline.loader.order import check_shares, count_batches, rank_batches, shuffled
from stl_offline.loader.threads import Workers, torch_threads_kept
from stl_offline.loader.token_op import TokenDraw, TokenLabels

# Views are float32: an edge this far outside the image is on it.
_VIEW_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ImageSettings:
    """How a model takes images.

    Args:
        size: (H, W) in pixels.
        mean, std: of the normalisation, per channel, for pixels in [0, 1]; ImageNet's by default.
        interpolation: "area", "bilinear" or "bicubic" (`stl_offline.loader.decoder.resample`).

    Raises:
        InputError: a value out of its range.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "area"

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise InputError(f"the image size must be two positive numbers (H, W), got {self.size}")
        if min(self.std) <= 0:
            raise InputError(f"std must be positive, got {tuple(self.std)}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation must be one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}")


class TokenLoader:
    """Loads a .beton through FFCV: crops, class ids and, with ``labels``, token targets.

    Args:
        beton: the packed images.
        images: size and normalisation of the images handed out.
        batch_size: B; the last batch of an epoch may be smaller.
        labels: what token targets are made from; None: batches without token targets.
        workers: loading threads; at most as many as there are cores are used.
        seed: seed of the order and of drawn token targets.
        device: where batches go.
        shuffle: a new order each epoch, from (seed, epoch) alone; otherwise the .beton's order.
        world: this process among those that share the samples.
        repeats: crops m of each image in a batch, from one decode: repeated augmentation (Berman et al., MultiGrain,
            arXiv 1902.05509). Epochs g · m … g · m + m − 1 then show their crops
            together. Each of them shows an m-th part of the images, B / m in a batch, with m crops of each: crop r as
            epoch g · m + r of a loader without repeats shows it. So an epoch has as many batches as without. Crops of
            an image follow each other. In a batch with an odd number of images, half of the middle one's are swapped
            with the first one's: samples i and B − 1 − i, which mixup and cutmix mix, are of different images, but for
            the middle sample of an odd B and batches of one image.

    Raises:
        InputError: an argument that cannot be used, or a cache that belongs to another .beton.
        FormatError: the .beton is shorter than its own table requires.

    Example:
        ::

            beton = open_beton("train.beton")
            cache = build_token_cache(labels, beton.keys, beton.content_hashes, beton.class_names)
            labels = TokenLabels(TokenTargets("gumbel", grid=(14, 14)), cache)
            loader = TokenLoader(beton, ImageSettings((224, 224)), batch_size=256, labels=labels, workers=8)
            for epoch in range(epochs):
                views = draw_views(0, epoch, np.arange(len(beton)), beton.heights, beton.widths, CropSettings())
                for batch in loader.epoch(epoch, views):
                    ...
    """

    def __init__(
        self,
        beton: Beton,
        images: ImageSettings,
        batch_size: int,
        *,
        labels: TokenLabels | None = None,
        workers: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        shuffle: bool = True,
        world: World = World(),  # noqa: B008
        repeats: int = 1,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be positive, got {batch_size}")
        if repeats < 1 or batch_size % repeats:
            raise InputError(f"repeats must divide the batch size, {batch_size}; got {repeats}")
        if not 0 <= world.rank < world.size:
            raise InputError(f"the rank must lie in 0 … {world.size - 1}, got {world.rank}")
        if labels is not None:
            _check_labels(labels, beton)
        check_shares(len(beton), batch_size, world.size, repeats)
        self.beton, self.repeats = beton, repeats
        self.image_size = (int(images.size[0]), int(images.size[1]))
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:  # the loading thread has another current one
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.tokens = labels.targets if labels else None
        self._targets_per_token = labels.targets_per_token if labels else 0
        self._shuffle, self._world = shuffle, world
        self._to_device = ToDevice(self.device, self.image_size[1], images.mean, images.std)
        self._thread: BatchThread | None = None
        self._views: np.ndarray | None = None
        self._warps: np.ndarray | None = None
        self._first_epoch = 0
        threads = Workers(workers)
        self._crop = ViewCrop(self.image_size, threads, beton, images.interpolation)
        self._draw = TokenDraw(labels, threads, seed, beton.class_ids) if labels is not None else None
        self._open()

    def _open(self) -> None:
        """Allocate what epochs take turns with, as only one is alive at a time."""
        _check_size(self.beton)
        pipelines: dict[str, Any] = {
            "image": PipelineSpec("image", self._crop),
            "class_id": None if self._draw is None else PipelineSpec("class_id", self._draw),
            "key_hash": None,
            "content_hash": None,
        }
        # The operations run compiled code of this package on threads of their own. FFCV would compile its part anew
        # for every loader.
        with torch_threads_kept(), _compiler_off():
            self._ffcv = Loader(
                str(self.beton.path),
                self.batch_size,
                num_workers=1,
                os_cache=True,
                pipelines=pipelines,
                drop_last=False,
                batches_ahead=BATCHES_AHEAD,
            )
        with contextlib.nullcontext() if self.device.type == "cuda" else _not_pinned():
            self._buffers = self._ffcv.graph.allocate_memory(self.batch_size, BATCHES_AHEAD + 2)

    def _load(self, batches: list[np.ndarray]) -> BatchThread:
        """A thread that loads these batches of sample ids; not started."""
        return EpochThread(self._ffcv, batches, self._buffers, self._check_batch)

    @property
    def keys(self) -> Sequence[str]:
        """Every sample's key, by sample id."""
        return self.beton.keys

    def __len__(self) -> int:
        """Batches of one epoch for this rank."""
        return count_batches(len(self.beton), self.batch_size, self._world.size)

    def samples_of(self, ids: np.ndarray) -> np.ndarray:
        """The samples of crops with these numbers, as `stl_offline.loader.decoder.ViewCrop` numbers them."""
        return ids % max(1, len(self.beton))

    def epoch(
        self,
        epoch: int,
        views: np.ndarray,
        *,
        warps: np.ndarray | None = None,
        labels: TokenLabels | None = None,
        map_index: np.ndarray | None = None,
        cache_index: np.ndarray | None = None,
        start_batch: int = 0,
        sample_ids: np.ndarray | None = None,
        repeats: int | None = None,
    ) -> Epoch:
        """Start one epoch; batches are loaded ahead from now on. An epoch that is still running is closed.

        Args:
            epoch: its number, from 0: sets the order and what token targets draw.
            views: float32 (n, 6): every sample's view, by sample id; axis-aligned crops inside the image. With
                ``repeats`` m, (m · n, 6): all samples' views of epoch g · m, then those of the next epoch, and so on;
                so are warps, map_index and cache_index.
            warps: float32 (n, 6): how each sample's pixels are moved within its crop after loading, as a view of
                it. Targets are for the moved pixels; the batch carries its warps to whoever moves them.
            labels: of this and the next epochs, such as caches of other views; of the same kind as the loader's.
            map_index: int64 (n,): which of its stored maps each sample's targets come from; the first by default.
            cache_index: int64 (n,): which of several caches; the first by default.
            start_batch: batches to leave out at the start, to go on in the middle of an epoch.
            sample_ids: these samples in this order instead of all, or of the epoch's part of them.
            repeats: of this epoch, if not the loader's: 1 shows one crop of each image.

        Returns:
            An iterator of `Batch`, with ``close()``; also a context manager.

        Raises:
            InputError: views, labels, map_index or sample_ids do not fit.
            FormatError: while iterating: an image that cannot be decoded, or has changed since packing.
            TrainingError: while iterating: the loading thread failed.
        """
        self.close()
        samples = len(self.beton)
        repeats = self.repeats if repeats is None else repeats
        if repeats not in (1, self.repeats):
            raise InputError(f"an epoch has the {self.repeats} repeats of its loader, or 1; got {repeats}")
        first = epoch - epoch % repeats
        if sample_ids is not None:
            order = np.asarray(sample_ids, dtype=np.int64)
            if order.ndim != 1 or (order.size and (order.min() < 0 or order.max() >= len(self.beton))):
                raise InputError(f"sample_ids must be one row of numbers in 0 … {len(self.beton) - 1}")
            batches = rank_batches(order, self.batch_size // repeats, self._world)
        else:
            order = shuffled(self.seed, first, samples) if self._shuffle else np.arange(samples)
            part = np.array_split(order, repeats)[epoch - first]
            batches = rank_batches(part, self.batch_size // repeats, self._world, len(self))
        numbers = samples * np.arange(repeats)
        batches = [(ids[:, None] + numbers).ravel() for ids in batches]
        # A dump has an epoch for each shard: checking the views of its samples only, it does not cost as much as one of
        # the whole data set.
        used = None if sample_ids is None else (order[:, None] + numbers).ravel()
        views = check_views(views, samples * repeats, used)
        shown = views
        if warps is not None:
            warps = np.ascontiguousarray(warps, dtype=np.float32)
            if warps.shape != views.shape or not np.isfinite(warps).all():
                raise InputError(f"warps must be finite numbers of the views' shape {views.shape}, got {warps.shape}")
            shown = compose_views(views, warps)
        if not 0 <= start_batch <= len(batches):
            raise InputError(f"start_batch must lie in 0 … {len(batches)}, got {start_batch}")
        self._crop.set_views(views)
        if self._draw is not None:
            if labels is not None:
                _check_labels(labels, self.beton)
                if labels.targets != self.tokens or labels.targets_per_token != self._targets_per_token:
                    raise InputError("an epoch's `labels` must give the targets of those that its loader was made with")
                self._draw.set_labels(labels)
            self._draw.set_epoch(first, views, shown, map_index, cache_index)
        elif not (labels is None and map_index is None and cache_index is None):
            raise InputError("labels, map_index or cache_index was given to a loader without token targets")
        self._views, self._warps, self._first_epoch = shown, warps, first
        self._thread = self._load(batches[start_batch:])
        return Epoch(self._thread, self._make_batch, self.device)

    def close(self) -> None:
        """End the running epoch, if any. Its buffers, which the next one fills, are copied to the device then."""
        if self._thread is not None:
            self._thread.close()
            for copied in self._thread.copied:
                if copied is not None:
                    copied.synchronize()
            self._thread = None

    def _check_batch(self, ids: np.ndarray) -> None:
        damaged = self._crop.take_damaged()
        if damaged is not None:
            raise self.beton.damaged(*damaged)

    def _make_batch(self, item: tuple[int, np.ndarray, tuple]) -> Batch:
        _, ids, (pixels, *tokens) = item
        to_device = self._to_device
        token_ids = token_weights = None
        places, swapped = _partners_apart(len(ids), self._crop.repeats)
        if len(places):
            ids = ids.copy()
            for array in (ids, pixels, *(tokens[0] if tokens else ())):
                array[places] = array[swapped]
        if tokens:
            shape = (len(ids), self.tokens.tokens, self._targets_per_token)
            token_ids = to_device.copy(tokens[0][0].reshape(shape), torch.int64)
            token_weights = to_device.copy(tokens[0][1].reshape(shape), torch.float32)
        return Batch(
            images=to_device.images(pixels),
            class_ids=to_device.copy(self.beton.class_ids[self.samples_of(ids)], torch.int64),
            token_ids=token_ids,
            token_weights=token_weights,
            views=torch.from_numpy(self._views[ids]),
            sample_ids=torch.from_numpy(self.samples_of(ids).astype(np.int64)),
            epochs=torch.from_numpy(self._first_epoch + ids // len(self.beton)),
            warps=None if self._warps is None else torch.from_numpy(self._warps[ids]),
        )


def _partners_apart(samples: int, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of a batch, and those whose samples they take, so that i and B − 1 − i are of different images.

    Without the swap, the crops of the middle one of an odd number of images would be each other's partners.
    """
    images = samples // repeats
    last = np.arange(repeats - repeats // 2, repeats if images % 2 and images > 1 else 0)
    middle = images // 2 * repeats + last
    return np.concatenate([last, middle]), np.concatenate([middle, last])


def check_views(views: np.ndarray, samples: int, used: np.ndarray | None = None) -> np.ndarray:
    """Views as the loader takes them: float32 (n, 6), each an axis-aligned crop within its image.

    used: the numbers of those to check, int64; all by default.

    Raises:
        InputError: another shape, or a view that rotates, shears, turns upside down, is empty or leaves the image.
    """
    views = np.ascontiguousarray(views, dtype=np.float32)
    if views.shape != (samples, 6):
        raise InputError(f"the loader needs a view for each of {samples:,} samples, ({samples}, 6); got {views.shape}")
    checked = views if used is None else views[used]
    width, across, left, down, height, top = checked.T.astype(np.float64)
    aligned = (across == 0) & (down == 0) & (width != 0) & (height > 0)
    ends = left + width
    low, high = -_VIEW_TOLERANCE, 1 + _VIEW_TOLERANCE
    inside = (np.minimum(left, ends) >= low) & (np.maximum(left, ends) <= high) & (top >= low) & (top + height <= high)
    # Comparisons with NaN are false, so numbers that are not finite fail here too.
    wrong = np.flatnonzero(~(aligned & inside))
    if wrong.size:
        example = wrong[0]
        reason = "is not an axis-aligned crop" if not aligned[example] else "leaves the image"
        number = example if used is None else used[example]
        raise InputError(
            f"the view of sample {number} {reason}: {checked[example].tolist()} ({wrong.size:,} such views); "
            "the loader crops and mirrors, other transforms happen on the device"
        )
    return views


def _check_labels(labels: TokenLabels, beton: Beton) -> None:
    for cache in labels.caches:
        if len(cache.labelled) != len(beton):
            raise InputError(
                f"the token cache has {len(cache.labelled):,} samples, {beton.path} has {len(beton):,}; "
                "build the cache from this .beton's keys"
            )


@contextlib.contextmanager
def _compiler_off() -> Iterator[None]:
    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(enabled)


@contextlib.contextmanager
def _not_pinned() -> Iterator[None]:
    """FFCV pins its buffers wherever torch sees a GPU, which takes memory of that."""
    allocate = graph.allocate_query
    graph.allocate_query = lambda query, batch_size, slots: np.empty((slots, batch_size, *query.shape), query.dtype)
    try:
        yield
    finally:
        graph.allocate_query = allocate


def _check_size(beton: Beton) -> None:
    # Reading a mapped file past its end kills the process, so this must be known before.
    needed = int((beton.pointers + beton.sizes).max(initial=0))
    size = os.path.getsize(beton.path) if beton.path.exists() else 0
    if size < needed:
        raise FormatError(f"{beton.path} is cut off: {size:,} of at least {needed:,} bytes; pack the images again")
