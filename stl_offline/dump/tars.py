"""Labels of images in tars, each read once from first to last, from where it lies: one shard for each tar.

The images of a tar go through temporary .beton files of a few hundred or thousand images, so that whatever decodes,
crops and labels images of packed files does so here, with the same result. The next one is filled while one is
labelled.
"""

import itertools
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stl_offline.config import DumpConfig
from stl_offline.device import pick_workers
from stl_offline.dump.labelling import Labelling, make_spec, settle
from stl_offline.errors import InputError, counted
from stl_offline.files import canonical_json, sha256_bytes
from stl_offline.images.beton import Beton, BetonWriter, open_beton
from stl_offline.images.classes import UNLABELLED, read_class_map
from stl_offline.images.common import PassedOver, SourceImage
from stl_offline.images.encode import content_hash, encode_image
from stl_offline.images.pack import EncodeResult, broken_image, encode_all, ensure_beton
from stl_offline.images.sources import find_tars
from stl_offline.images.tar_stream import StreamedClasses, StreamedSample, read_samples, tar_name
from stl_offline.labels.arrays import ShardArrays, concatenate
from stl_offline.labels.spec import OWN_CLASSES
from stl_offline.labels.tar_writer import FirstImage, TarLabelWriter
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.models import TokenLabeler
from stl_offline.pixels import ImageError
from stl_offline.remote import is_address, shown

_LOGGER = logging.getLogger(__name__)

# Batches of the first temporary file, so that labelling begins soon; each next one has twice as many.
_FIRST_BATCHES = 4
_MOST_IMAGES, _MOST_BYTES = 1024, 256 << 20
# Views of a tar's images: their labels are in memory until the shard is written.
_MOST_MAPS = 1 << 20
# Views are drawn for numbers below 2^40 (`stl_offline.random`).
_HASH_SHIFT = np.uint64(24)


class TarLabelling:
    """A labeler with tars of images that it labels, in the place of a `Labelling`.

    spec: the label set's settings, without what is known at the end only; num_shards: the tars.

    Args:
        tars: paths or addresses.

    Raises:
        StlError: as `Labelling`; or the first tar cannot be read.
    """

    def __init__(self, config: DumpConfig, labeler: TokenLabeler, tars: Sequence[str], device: torch.device) -> None:
        self.config, self.device = settle(config, labeler), device
        self.num_shards = len(tars)
        self.place = shown(config.data)
        self._tars = list(tars)
        renamed = None if config.class_map is None else read_class_map(config.class_map)
        self._classes = StreamedClasses(labeler.class_names, f"the labeler {config.labeler}", renamed)
        first, self._has_classes = self._classes.of_first(tars[0])
        self.first = self._first_image(tar_name(tars[0]), first)
        source = {"samples": 1, "fingerprint": ""} | ({} if self._has_classes else {OWN_CLASSES: False})
        spec = make_spec(self.config, labeler, source)
        # Packed images' fingerprint has their classes; of tars, nothing that is known before they are read.
        mapped = {} if renamed is None else {"class_map": sha256_bytes(canonical_json(renamed))}
        self.spec = replace(spec, creation=spec.creation | mapped)
        self.labeler = labeler
        self.views = range(max(1, config.crops_per_image))

    def open_writer(self) -> TarLabelWriter:
        """What writes the label set; to be entered."""
        return TarLabelWriter(self.config.out, self.spec, [tar_name(tar) for tar in self._tars], first=self.first)

    def images_of(self, writer: LabelSetWriter, shards: Sequence[int]) -> int | None:
        """None: how many images a tar holds is not known."""
        return None

    def label_shards(
        self, writer: LabelSetWriter, shards: Iterable[int | None], done: Callable[[int], object]
    ) -> Iterator[tuple[int, ShardArrays] | None]:
        """These shards with their labels, one after the other; None for None, as `Labelling.label_shards`."""
        for shard in shards:
            yield None if shard is None else (shard, self.label_shard(writer, shard, done))

    def label_shard(self, writer: LabelSetWriter, shard: int, done: Callable[[int], object]) -> ShardArrays:
        """The labels of a tar's images, in its order; ``done(B)`` is called after each batch.

        Raises:
            StlError: the tar cannot be read, an image is broken, or as `Labelling.label`.
        """
        parts = []
        with (
            tempfile.TemporaryDirectory(prefix="stl-offline-") as folder,
            closing(self.chunks(self._tars[shard], Path(folder))) as chunks,
            ThreadPoolExecutor(1, thread_name_prefix="tar") as reader,
        ):
            filled = reader.submit(next, chunks, None)
            while (chunk := filled.result()) is not None:
                filled = reader.submit(next, chunks, None)
                parts.append(self.label_chunk(chunk, done))
                chunk.path.unlink()
        return concatenate(parts)

    def label_chunk(self, chunk: Beton, done: Callable[[int], object]) -> ShardArrays:
        """The labels of some of a tar's images. Random crops depend on an image's content, not on its place."""
        labelling = Labelling(self.config, self.labeler, chunk, self.device, content_ids(chunk))
        try:
            return labelling.label(np.arange(len(chunk)), done)
        finally:
            labelling.loader.close()  # its buffers are pinned where the device is a GPU

    def chunks(self, tar: str, folder: Path, batches: int = _FIRST_BATCHES) -> Iterator[Beton]:
        """The images of a tar in temporary files. All but the last hold whole batches, so that what is labelled
        together does not depend on how they are cut. batches: of the first one."""
        where, batch = shown(tar), self.config.batch_size
        names = self._classes.names if self._has_classes else (UNLABELLED,)
        limit, count = batches * batch, 0
        with closing(self._encoded(tar)) as images:
            for number in itertools.count():
                path = folder / f"{number}.beton"
                with open(path, "wb") as stream:
                    writer = BetonWriter(stream, limit)
                    _fill(writer, images, limit, batch, where)
                    if not len(writer):
                        break
                    writer.finish(names, {"kind": "tar", "max_size": None})
                count += len(writer)
                if count * len(self.views) > _MOST_MAPS:
                    raise InputError(
                        f"{where} holds more than {_MOST_MAPS // len(self.views):,} images, too many for one shard; "
                        "give `shards`, so that the images are packed first"
                    )
                yield replace(open_beton(path), place=where)
                limit = max(batch, min(2 * limit, _MOST_IMAGES // batch * batch))
        if not count:
            raise InputError(f"{where} has no image that can be used; all are broken")

    def _first_image(self, tar: str, sample: StreamedSample) -> FirstImage | None:
        """By what the tars are told from others of the same names; None where no label set can have it."""
        try:
            data = sample.image.read()
            encode_image(data)
        except ImageError:
            return None
        return FirstImage(tar, sample.key, content_hash(data))

    def _encoded(self, tar: str) -> Iterator[EncodeResult]:
        """The images of a tar as they are stored, without the broken ones; logs what was left out."""
        where, passed_over = shown(tar), PassedOver()
        skipped: list[tuple[str, str]] = []
        with closing(read_samples(tar, passed_over)) as samples:
            found = ((sample, self._classes.number(sample, self._has_classes)) for sample in samples)
            images = (SourceImage(one.key, number, one.image.read, one.image.size) for one, number in found)
            with closing(encode_all(images, workers=pick_workers(self.config.workers))) as results:
                for result in results:
                    if result.image is not None:
                        yield result
                    elif self.config.skip_broken:
                        skipped.append((result.key, str(result.error)))
                    else:
                        raise broken_image(result.key, where, result.error)
        if passed_over:
            _LOGGER.warning("passed over %s of %s: %s", counted(len(passed_over), "file"), where, passed_over)
        for key, reason in skipped:
            _LOGGER.warning("left out %s of %s: %s", key, where, reason)


def _fill(writer: BetonWriter, images: Iterator[EncodeResult], limit: int, batch: int, where: str) -> None:
    """Write the next images, at most ``limit`` and not many more bytes than fit into memory, in whole batches."""
    size = 0
    for result in images:
        try:
            writer.add(result.key, result.class_id, result.image)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        size += len(result.image.data)
        if len(writer) == limit or (size >= _MOST_BYTES and len(writer) % batch == 0):
            return


def content_ids(beton: Beton) -> np.ndarray:
    """Numbers, int64 (n,), from which random crops of images are drawn that have no place in a packed data set."""
    return (beton.content_hashes >> _HASH_SHIFT).astype(np.int64)


def streamed_tars(config: DumpConfig) -> list[str] | None:
    """The tars of a job that streams them: addresses, or several on this machine, unless ``shards`` is given.

    None for other images, which are packed. So is a single tar of this machine, to be divided among workers.
    """
    if config.shards:
        return None
    tars = find_tars(config.data)
    return tars if tars is not None and (len(tars) > 1 or is_address(tars[0])) else None


def prepare(config: DumpConfig, labeler: TokenLabeler, device: torch.device) -> Labelling | TarLabelling:
    """The labeler with the images of the settings, packed first unless they are streamed."""
    tars = streamed_tars(config)
    if tars is not None:
        return TarLabelling(config, labeler, tars, device)
    return Labelling(config, labeler, packed_images(config), device)


def packed_images(config: DumpConfig) -> Beton:
    """The images of the settings, packed first if they are not. Raises as `ensure_beton`."""
    if config.class_map is None:
        return ensure_beton(config.data, skip_broken=config.skip_broken)
    if config.data.endswith(".beton"):
        raise InputError(f"`class_map` does nothing for {config.data}, whose classes have names; leave it out")
    return ensure_beton(config.data, skip_broken=config.skip_broken, class_map=read_class_map(config.class_map))
