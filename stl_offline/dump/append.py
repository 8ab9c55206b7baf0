"""``dump-labels --append``: labels the images that a label set lacks, as further shards of it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from stl_offline.config import DumpConfig
from stl_offline.dump.labelling import Labelling, check_shards, pick_shards
from stl_offline.dump.tars import TarLabelling, content_ids, packed_images, streamed_tars
from stl_offline.errors import InputError
from stl_offline.images.beton import Beton
from stl_offline.images.tar_stream import tar_name
from stl_offline.labels.append import AppendWriter, OldImages, TarAppendWriter, added_source, check_settings
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.manifest import shard_range
from stl_offline.labels.store import MANIFEST, open_storage
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.models import TokenLabeler


class AppendLabelling(Labelling):
    """A `Labelling` of the images of packed ones that a label set lacks. Random crops depend on an image's content."""

    def __init__(
        self, config: DumpConfig, labeler: TokenLabeler, beton: Beton, device: torch.device, base: LabelSet
    ) -> None:
        super().__init__(config, labeler, beton, device, content_ids(beton))
        check_settings(base, self.spec)
        self._base, self._old = base, OldImages.of(base)
        classes = self.class_map[beton.class_ids]
        self.rows = self._old.new(beton.keys, classes, beton.content_hashes, beton.place)
        if len(self.rows):
            check_shards(config.shards, len(self.rows))
        self.num_shards = config.shards or pick_shards(len(self.rows), config.crops_per_image)

    def open_writer(self) -> AppendWriter:
        sizes = [last - first for first, last in map(self._range, range(self.num_shards))]
        keys = [self.beton.keys[row] for row in self.rows]
        classes = self.class_map[self.beton.class_ids[self.rows]]
        source = added_source(self._base, self._old, keys, classes, self.beton.content_hashes[self.rows])
        return AppendWriter(self._base, sizes, source)

    def samples_of(self, writer: LabelSetWriter, shard: int) -> np.ndarray:
        first, last = self._range(shard - len(self._base.shards))
        return self.rows[first:last]

    def _range(self, shard: int) -> tuple[int, int]:
        """The half-open range of ``rows`` of an added shard."""
        return shard_range(shard, self.num_shards, len(self.rows))


class AppendTars(TarLabelling):
    """A `TarLabelling` of the tars that a label set does not name."""

    def __init__(
        self, config: DumpConfig, labeler: TokenLabeler, tars: Sequence[str], device: torch.device, base: LabelSet
    ) -> None:
        known = {shard.images for shard in base.shards}
        super().__init__(config, labeler, tars, device)
        check_settings(base, self.spec, ("creation.class_map",))
        self._base = base
        if self.first is not None and self.first.tar in known:
            index = next(index for index, shard in enumerate(base.shards) if shard.images == self.first.tar)
            self.first.check(base.read_index(index), base.place)
        self._tars = self.rows = [tar for tar in tars if tar_name(tar) not in known]
        self.num_shards = len(self._tars)

    def open_writer(self) -> TarAppendWriter:
        return TarAppendWriter(self._base, [tar_name(tar) for tar in self._tars])

    def label_shard(self, writer: LabelSetWriter, shard: int, done: Callable[[int], object]) -> ShardArrays:
        return super().label_shard(writer, shard - len(self._base.shards), done)


def prepare_append(config: DumpConfig, labeler: TokenLabeler, device: torch.device) -> AppendLabelling | AppendTars:
    """The labeler with the images that the label set ``out`` lacks (``rows``: their places, or tars).

    Raises:
        StlError: there is no complete label set, or one with other settings; images that it holds have changed.
    """
    if open_storage(config.out).size(MANIFEST) is None:
        raise InputError(f"there is no complete label set at {config.out} to append to; leave out `append` to make one")
    base = open_label_set(config.out)
    tars = streamed_tars(config)
    if tars is not None:
        return AppendTars(config, labeler, tars, device, base)
    return AppendLabelling(config, labeler, packed_images(config), device, base)
