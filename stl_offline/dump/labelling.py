"""From images to label maps, for a dump, its estimate, and recomputation.

B: batch, N: tokens on a grid (Gh, Gw), K: classes, k: classes kept, V: views of an image.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from stl_offline.config import DumpConfig, result_settings
from stl_offline.device import Readback, autocast, exact_float32, pick_amp, pick_workers
from stl_offline.dump.drawing import DrawKey, draw_classes
from stl_offline.errors import FormatError, InputError, counted
from stl_offline.evaluation import match_classes
from stl_offline.geometry import draw_views, whole_views
from stl_offline.images.beton import Beton
from stl_offline.images.classes import UNLABELLED
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.rules import check_keys
from stl_offline.labels.spec import OWN_CLASSES, LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.loader import DECODER, Batch, ImageSettings, TokenLoader
from stl_offline.models import TokenLabeler, create_labeler
from stl_offline.random import STREAM_CLASS_DRAW, STREAM_DRAW

# Shards are read whole, and a killed job repeats those that it had not stored, so they must not be too large. Nor too
# small: each has a description of 7 kB of its own, and an image's labels take 1 to 3 kB.
_SHARD_SAMPLES, _LEAST_SHARD_SAMPLES, _SHARDS = 4096, 512, 8
_SHARD_MAPS = 16 * _SHARD_SAMPLES
# Batches that a CPU labels at the same time. Threads that share a batch wait for each other at every operation, and
# burn their cores meanwhile: where one core is loading, encoding or busy with another program, all of them stand still.
_CPU_BATCHES = 2


def load_labeler(config: DumpConfig) -> TokenLabeler:
    """The labeler that the settings name, on the CPU, after all checks that need no images.

    Raises:
        StlError: as `create_labeler`; a labeler without class names, or of fewer classes than ``top_k``.
    """
    labeler = create_labeler(
        config.labeler,
        labeler_checkpoint=config.labeler_checkpoint,
        labeler_pretrained=config.labeler_pretrained,
        labeler_classes=config.labeler_classes,
        labeler_by_order=config.labeler_by_order,
        labeler_mean=config.labeler_mean,
        labeler_std=config.labeler_std,
        img_size=config.img_size,
    )
    if labeler.class_names is None:
        raise InputError(
            f"the {labeler.num_classes} classes of {config.labeler} have no names (timm names ImageNet's only); give "
            "`labeler_classes`, a text file with one name per line or a label set"
        )
    for name in ("top_k", "class_top_k"):
        if (getattr(config, name) or 0) > labeler.num_classes:
            raise InputError(
                f"`{name}` is {getattr(config, name)}, but the labeler has only {labeler.num_classes} classes"
            )
    return labeler


@dataclass
class _Part:
    """Samples (n,) that are labelled together, such as those of a shard, and their labels as far as they are made."""

    number: int
    samples: np.ndarray
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


class _PartBatch(NamedTuple):
    """A batch of a part's samples ``rows`` under its view number ``view``."""

    batch: Batch
    part: _Part
    view: int
    rows: slice


class Labelling:
    """A labeler with the images that it labels, as a `DumpConfig` asks for.

    config: with ``interpolation`` resolved; spec: the label set's settings; num_shards: number of files; views: float32
    (V, n, 6).

    Args:
        labeler: what `load_labeler` gives; it is moved to ``device``.
        sample_ids: int64 (n,), from which random crops are drawn; the places of the images in ``beton`` by default.

    Raises:
        StlError: images, labeler and settings that do not fit each other.
    """

    def __init__(
        self,
        config: DumpConfig,
        labeler: TokenLabeler,
        beton: Beton,
        device: torch.device,
        sample_ids: np.ndarray | None = None,
    ) -> None:
        self.beton, self.device = beton, device
        config = settle(config, labeler)
        self.config = config
        self.num_shards = config.shards or pick_shards(len(beton), config.crops_per_image)
        check_shards(config.shards, len(beton))
        own = {} if beton.class_names != (UNLABELLED,) else {OWN_CLASSES: False}
        spec = make_spec(config, labeler, {"samples": len(beton), "fingerprint": beton.fingerprint} | own)
        # The fingerprint is that of the images as they were before.
        shrunk = {} if beton.max_size is None else {"max_size": beton.max_size}
        self.spec = replace(spec, creation=spec.creation | shrunk)
        _check_class_ids(beton)
        # Earlier releases packed keys that no label set can hold.
        check_keys(beton.keys)
        if self.spec.has_own_classes:
            self.class_map = match_classes(beton, labeler.class_names, f"the labeler {config.labeler}")
        else:
            self.class_map = np.zeros(1, dtype=np.int64)
        self.views = make_views(config, beton, sample_ids)
        self.labeler = labeler.to(device, memory_format=torch.channels_last)

    @property
    def place(self) -> str:
        """What the images were named, for messages."""
        return self.beton.place

    def open_writer(self) -> LabelSetWriter:
        """What writes the label set; to be entered."""
        return LabelSetWriter(self.config.out, self.spec, self.num_shards)

    def images_of(self, writer: LabelSetWriter, shards: Sequence[int]) -> int | None:
        """How many images some shards hold; None where that is not known."""
        return sum(last - first for first, last in map(writer.shard_range, shards))

    def samples_of(self, writer: LabelSetWriter, shard: int) -> np.ndarray:
        """The places, int64 (n,), of a shard's images in ``beton``."""
        return np.arange(*writer.shard_range(shard))

    def label_shard(self, writer: LabelSetWriter, shard: int, done: Callable[[int], object]) -> ShardArrays:
        """The labels of a shard; raises as `label`."""
        return self.label(self.samples_of(writer, shard), done)

    def label_shards(
        self, writer: LabelSetWriter, shards: Iterable[int | None], done: Callable[[int], object]
    ) -> Iterator[tuple[int, ShardArrays] | None]:
        """These shards with their labels, in order; None for None. ``shards``: `LabelSetWriter.claim_ahead`.

        The first batch of a shard is started before the last ones of the shard before are done, and that shard is
        given only then. What comes before a None or an error is given first.
        """
        return self._label_parts(
            (None if shard is None else (shard, self.samples_of(writer, shard)) for shard in shards), done
        )

    @cached_property
    def loader(self) -> TokenLoader:
        """Loads the images with the labeler's preprocessing."""
        labeler = self.labeler
        images = ImageSettings(labeler.img_size, labeler.mean, labeler.std, self.config.interpolation)
        workers = pick_workers(self.config.workers)
        return TokenLoader(
            self.beton, images, self.config.batch_size, workers=workers, device=self.device, shuffle=False
        )

    @property
    def _batches_at_once(self) -> int:
        """Batches that are labelled at the same time. Functions of a user need not stand that: they get one."""
        is_shared = self.device.type == "cpu" and isinstance(self.labeler, TokenLabeler)
        return min(_CPU_BATCHES, torch.get_num_threads()) if is_shared else 1

    def label(self, samples: np.ndarray, done: Callable[[int], object]) -> ShardArrays:
        """Label these samples (n,); ``done(B)`` is called after each batch.

        Batches contain only these samples, so the result depends on nothing else.

        Raises:
            InputError: the labeler gives NaN or infinity (names an image), or an image cannot be decoded.
        """
        with closing(self._label_parts([(0, samples)], done)) as labelled:
            [(_, arrays)] = list(labelled)
        return arrays

    def _label_parts(
        self, parts: Iterable[tuple[int, np.ndarray] | None], done: Callable[[int], object]
    ) -> Iterator[tuple[int, ShardArrays] | None]:
        """The labels of numbered sets of samples (n,), as `label_shards` gives those of shards."""

        def start(item: _PartBatch) -> Callable[[], tuple[_Part, int, slice, dict[str, np.ndarray]]]:
            # Without the batch: its images go once they are labelled.
            part, view, rows = item.part, item.view, item.rows
            labels = self._label_batch(item.batch, view)
            return lambda: (part, view, rows, labels())

        with (
            closing(self._batches(parts)) as batches,
            closing(_each(start, batches, self._batches_at_once)) as results,
        ):
            for result in results:
                if result is None:
                    yield None
                    continue
                part, view, rows, labels = result
                size = rows.stop - rows.start
                for name, values in labels.items():
                    if name not in part.arrays:
                        shape = (len(part.samples), len(self.views), *self._shape(name, values))
                        part.arrays[name] = np.empty(shape, values.dtype)
                    part.arrays[name][rows, view] = values.reshape(size, *part.arrays[name].shape[2:])
                done(size)
                if view == len(self.views) - 1 and rows.stop == len(part.samples):
                    yield part.number, self._with_labels(part)
                # Whoever was given them may wait for others now, and need them no more.
                del result, part, labels

    def _batches(self, parts: Iterable[tuple[int, np.ndarray] | None]) -> Iterator[_PartBatch | None]:
        """The batches of each part, view by view; None for None."""
        for each in parts:
            if each is None:
                yield None
            else:
                yield from self._batches_of(_Part(*each))

    def _batches_of(self, part: _Part) -> Iterator[_PartBatch]:
        for view, views in enumerate(self.views):
            first = 0
            with self.loader.epoch(0, views, sample_ids=part.samples) as batches:
                for batch in batches:
                    rows = slice(first, first + len(batch))
                    first = rows.stop
                    yield _PartBatch(batch, part, view, rows)

    def _with_labels(self, part: _Part) -> ShardArrays:
        samples = part.samples
        return ShardArrays(
            keys=[self.beton.keys[sample] for sample in samples],
            content_hash=self.beton.content_hashes[samples],
            class_id=self.class_map[self.beton.class_ids[samples]],
            views=np.ascontiguousarray(self.views[:, samples].transpose(1, 0, 2)),
            **part.arrays,
        )

    @torch.inference_mode()
    def _label_batch(self, batch: Batch, view: int) -> Callable[[], dict[str, np.ndarray]]:
        """Start labelling a batch under the view ``self.views[view]``; called from several threads.

        What it gives waits for the labels, as `ShardArrays` has them: (B, N, …), and (B, …) of the class head.
        """
        with exact_float32(self.device), autocast(self.device, pick_amp(self.config.amp, self.device)):
            class_logits, token_logits = self.labeler(batch.images)
        labels = self._labels(class_logits, token_logits, batch, self.spec.first_view + view)
        return partial(self._read, {name: Readback(values) for name, values in labels.items()}, batch.sample_ids)

    def _read(self, labels: dict[str, Readback], sample_ids: Tensor) -> dict[str, np.ndarray]:
        found = {name: values.array() for name, values in labels.items()}
        for name, is_stored in (
            ("confidence", self.spec.has_confidence),
            ("head_confidence", self.spec.class_top_k > 0),
        ):
            if name in found and not np.isfinite(found[name]).all():
                wrong = ~np.isfinite(found[name]).reshape(len(sample_ids), -1).all(axis=1)
                key = self.beton.keys[int(sample_ids[int(wrong.argmax())])]
                raise InputError(
                    f"the labeler gives logits that are not finite for {wrong.sum()} of {len(sample_ids)} "
                    f"images, the first is {key!r}; check its weights, and that `amp` is not fp16"
                )
            if not is_stored:
                found.pop(name, None)
        return {
            name: values if values.dtype.kind == "f" else values.astype(self.spec.id_dtype)
            for name, values in found.items()
        }

    def _shape(self, name: str, values: np.ndarray) -> tuple[int, ...]:
        """The shape of one view's part of an array: of labels (B, N, …), or of the class head's (B, …)."""
        return values.shape[1:] if name.startswith("head_") else (*self.spec.grid, *values.shape[2:])

    def _labels(self, class_logits: Tensor, token_logits: Tensor, batch: Batch, view: int) -> dict[str, Tensor]:
        """The labels of a batch under its view number ``view``; with confidence, stored or not, to check it."""
        spec = self.spec
        labels = self._answer(token_logits, spec.top_k, spec.draws, batch, view, STREAM_DRAW)
        if spec.class_top_k or spec.class_draws:
            head = self._answer(
                class_logits[:, None], spec.class_top_k, spec.class_draws, batch, view, STREAM_CLASS_DRAW
            )
            for name, stored in (("ids", "class_ids"), ("logits", "logits")):
                if spec.class_top_k:
                    labels[f"head_{name}"] = head[stored][:, 0]
            labels["head_confidence"] = head["confidence"][:, 0]
            if spec.class_draws:
                labels["head_draws"] = head["draws"][:, 0]
        return labels

    def _draw(self, logits: Tensor, draws: int, key: DrawKey, without: Tensor, samples: np.ndarray) -> Tensor:
        """Classes (B, N, S) drawn for logits (B, N, K) of these samples (B,)."""
        return draw_classes(logits, draws, key, without)

    def _answer(
        self, logits: Tensor, top_k: int, draws: int, batch: Batch, view: int, stream: int
    ) -> dict[str, Tensor]:
        """Of logits (B, N, K): class_ids and logits (B, N, k), confidence (B, N) and, where S > 0, draws (B, N, S)."""
        logits = logits.float()
        ids, best, confidence = top_k_labels(logits, top_k)
        found = {"class_ids": ids, "logits": best, "confidence": confidence}
        if draws:
            samples = batch.sample_ids.numpy()
            key = DrawKey(self.config.seed, stream, self.beton.content_hashes[samples], view)
            found["draws"] = self._draw(logits, draws, key, ids, samples)
        return found


def _each(work: Callable[[Any], Callable[[], Any]], batches: Iterable[Any], at_once: int) -> Iterator[Any]:
    """What ``work`` starts for each batch, in order; of ``at_once`` of them at the same time, each by its share of
    torch's threads. A single one is waited for once the next is started, so that a GPU has work meanwhile.

    What comes before a None among the batches, which is given as such, or before an error is given first.
    """
    threads, pool = torch.get_num_threads(), None
    if at_once > 1:
        pool = ThreadPoolExecutor(
            at_once, "labelling", initializer=torch.set_num_threads, initargs=(max(1, threads // at_once),)
        )
    pending: deque[Callable[[], Any]] = deque()
    try:
        for wait in _started(work, batches, pool):
            if wait is None:
                while pending:
                    yield pending.popleft()()
                yield None
            else:
                pending.append(wait)
                # One more than there are threads, so that none waits for its next batch.
                if len(pending) > at_once:
                    yield pending.popleft()()
        while pending:
            yield pending.popleft()()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
            # The threads have set what others start with, too.
            torch.set_num_threads(threads)


def _started(
    work: Callable[[Any], Callable[[], Any]], batches: Iterable[Any], pool: ThreadPoolExecutor | None
) -> Iterator[Callable[[], Any] | None]:
    """What waits for each batch that is started, here or in the pool; None for None, and before an error."""
    try:
        for batch in batches:
            if batch is None:
                yield None
            elif pool is None:
                yield work(batch)
            else:
                yield pool.submit(lambda batch: work(batch)(), batch).result
    except Exception:
        yield None
        raise


def make_views(config: DumpConfig, beton: Beton, sample_ids: np.ndarray | None = None) -> np.ndarray:
    """The views to label: float32 (V, n, 6); the whole image, or V random crops as a student would draw them."""
    if config.crops_per_image == 0:
        return whole_views(len(beton))[None]
    crops = config.crop_settings()
    samples = np.arange(len(beton)) if sample_ids is None else sample_ids
    return np.stack(
        [
            draw_views(config.seed, config.first_view + view, samples, beton.heights, beton.widths, crops)
            for view in range(config.crops_per_image)
        ]
    )


def top_k_labels(token_logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token logits (B, N, K) → class ids (B, N, k), their logits (B, N, k), confidence (B, N); float32, best first.

    k may be 0; the confidence is the best class's probability all the same.
    """
    token_logits = token_logits.float()
    logits, ids = token_logits.topk(max(1, k), dim=-1)
    confidence = torch.exp(logits[..., 0] - torch.logsumexp(token_logits, dim=-1))
    if not k:
        logits, ids = logits[..., :0], ids[..., :0]
    return ids, logits, confidence


def pick_shards(samples: int, views: int) -> int:
    """Number of shards for ``samples`` images: at most 4,096 images each, and at least 8 shards while none of them gets
    smaller than 512 images.

    With many crops per image a shard holds fewer images, since a process keeps the labels of two shards in memory, and
    of the next one's first batches, and loses them when it is killed.
    """
    most = max(1, min(_SHARD_SAMPLES, _SHARD_MAPS // max(1, views)))
    least = min(_LEAST_SHARD_SAMPLES, most)
    return max(min(_SHARDS, samples // least), -(-samples // most), 1)


def check_shards(shards: int, images: int) -> None:
    """Raise `InputError` where there are more shards than images."""
    if shards > images:
        raise InputError(f"`shards` is {shards}, which is more than the {counted(images, 'image')}; use fewer")


def _check_class_ids(beton: Beton) -> None:
    """Raise `FormatError` where an image's class is not in the class list: it would be written as another class."""
    wrong = np.flatnonzero((beton.class_ids < 0) | (beton.class_ids >= len(beton.class_names)))
    if len(wrong):
        first = int(wrong[0])
        raise FormatError(
            f"{len(wrong):,} of the {len(beton):,} images of {beton.path} have a class id outside 0 … "
            f"{len(beton.class_names) - 1}, the first is {beton.keys[first]!r} with {int(beton.class_ids[first])}; "
            "pack the images again"
        )


def settle(config: DumpConfig, labeler: TokenLabeler) -> DumpConfig:
    """The settings with ``interpolation`` and ``top_k`` resolved: by default the five most probable classes."""
    top_k = min(5, labeler.num_classes) if config.top_k is None else config.top_k
    interpolation = labeler.interpolation if config.interpolation == "auto" else config.interpolation
    return replace(config, top_k=top_k, interpolation=interpolation)


def make_spec(config: DumpConfig, labeler: TokenLabeler, source: dict[str, Any]) -> LabelSpec:
    """The manifest's settings. Neither paths nor dates enter it: the same job gives the same bytes anywhere."""
    height, width = labeler.img_size
    random_views = {"kind": "random", "seed": config.seed, "scale": [config.scale_min, 1.0], "ratio": [3 / 4, 4 / 3]}
    if config.first_view:
        random_views["first"] = config.first_view
    return LabelSpec(
        class_names=labeler.class_names,
        grid=labeler.grid_size(height, width),
        top_k=config.top_k,
        views_per_image=max(1, config.crops_per_image),
        labeler={
            "architecture": labeler.name,
            "weights_sha256": labeler.weights_sha256,
            "licence": config.licence,
        },
        preprocessing={
            "height": height,
            "width": width,
            "interpolation": config.interpolation,
            "mean": list(labeler.mean),
            "std": list(labeler.std),
            "decoder": DECODER,
        },
        source=source,
        views=random_views | {"flip": config.flip} if config.crops_per_image else {"kind": "whole"},
        creation=result_settings(config),
        encoding=config.encoding,
        container=config.format,
        draws=config.draws,
        draw_seed=config.seed if config.draws or config.class_draws else None,
        has_confidence=bool(config.top_k) or config.confidence,
        class_top_k=config.class_top_k,
        class_draws=config.class_draws,
    )
