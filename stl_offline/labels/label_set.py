"""Reads a label set: as a mapping from keys to label maps, or by whole shards for work."""

import contextlib
import itertools
import threading
from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from stl_offline.errors import FormatError, InputError, UnknownKeyError
from stl_offline.files import atomic_write, cache_dir, make_folder, sha256_bytes
from stl_offline.labels.arrays import LabelMap, ShardArrays, ShardIndex, join_views
from stl_offline.labels.format import decode_shard, read_shard_index
from stl_offline.labels.keys import find_duplicates, hash_keys, some
from stl_offline.labels.manifest import Manifest, ShardRecord
from stl_offline.labels.rules import check_index
from stl_offline.labels.spec import PARTS, LabelSpec, of_cell
from stl_offline.labels.store import (
    MANIFEST,
    PULL,
    Records,
    Storage,
    each_shard,
    format_ranges,
    open_storage,
    present_bytes,
    read_job,
    read_manifest,
    read_present,
)

# How often a shard is fetched again whose bytes came otherwise than they should.
_FETCHES = 3


def image_ranges(manifest: Manifest, present: Iterable[int]) -> list[list[tuple[int, int]]]:
    """Which images (first, and one behind the last) the present shards of each part of a set hold."""
    part_of = manifest.part_of_shards()
    found: dict[int, list[tuple[int, int]]] = {}  # first and last image of neighbouring shards, by part
    for index in sorted(present):
        first, last = manifest.shards[index].first, manifest.shards[index].first + manifest.shards[index].samples
        ranges = found.setdefault(part_of[index], [])
        if ranges and ranges[-1][1] == first:
            first = ranges.pop()[0]
        ranges.append((first, last))
    return list(found.values())


def check_same_images(place: str, manifest: Manifest, present: Iterable[int]) -> None:
    """Raise `InputError` where, of a set whose views lie in parts, the shards that are here are of different images."""
    first, *others = image_ranges(manifest, present)
    if any(other != first for other in others):
        raise InputError(
            f"of {place}, the shards {format_ranges(sorted(present))} hold views of different images; pull the shards "
            "of the same images for all of these views, or all images with `pull(views=…)`"
        )


class LabelSet(Mapping[str, LabelMap]):
    """A read-only mapping from an image's key to its `LabelMap`, in stored order. Made by `open_label_set`.

    ``items()`` and ``values()`` read each shard once; ``labels[key]`` reads a whole shard and keeps the last one, so a
    loop in another order than the stored one is slow. Label sets can be pickled: a `DataLoader` worker opens its own.

    spec: the settings; shards: the shard table; present: the shards that are here, all of them unless only some were
    pulled; fingerprint: SHA-256 of the manifest, which holds every shard's SHA-256, and so stands for the whole content
    (of the manifest and the list of present shards, where some are missing).

    parts: of a set whose views lie in several parts, one label set for each that is here, in the order of
    the views; of any other the set itself. ``spec`` is of the views that are here.
    """

    def __init__(
        self,
        storage: Storage,
        manifest: Manifest,
        present: tuple[int, ...] | None = None,
        *,
        whole: "LabelSet | None" = None,
    ) -> None:
        """whole: the label set that this is a part of."""
        self.storage = storage
        self.place = storage.place
        self.manifest = manifest
        self.spec: LabelSpec = manifest.spec
        self.shards: tuple[ShardRecord, ...] = manifest.shards
        self.present = tuple(range(len(self.shards))) if present is None else present
        if not self.present or not 0 <= min(self.present) <= max(self.present) < len(self.shards):
            raise FormatError(f"the label set {self.place} is empty: none of its {len(self.shards)} shards is here")
        # Made once for all parts: a spec holds all class names.
        self._part_of = manifest.part_of_shards() if whole is None else whole._part_of
        self._part_specs = (
            [self.spec.of_views(views) for views in self.spec.parts] if whole is None else whole._part_specs
        )
        self.parts: tuple[LabelSet, ...] = (self,)
        if len(self._part_specs) > 1:
            self._divide()
        # `hash_keys` of the shards whose keys were read.
        self._hashes: dict[int, np.ndarray] = {}
        self._last: tuple[int, ShardArrays] | None = None
        self._lock = threading.Lock()

    def _divide(self) -> None:
        """Set ``parts``, and let ``spec`` be of the views that are here."""
        here = sorted({self._part_of[index] for index in self.present})
        views = [self.spec.parts[number] for number in here]
        for before, after in itertools.pairwise(views):
            if before.stop != after.start:
                first = self.spec.first_view
                lacking = f"{first + before.stop}-{first + after.start - 1}"
                raise FormatError(
                    f"the label set {self.place} lacks the views {lacking} between those that are here; pull them from "
                    f'its source with `pull(views="{lacking}")`'
                )
        if len(here) == 1:
            self.spec = self._part_specs[here[0]]
            return
        spec = self.spec.of_views(range(views[0].start, views[-1].stop))
        self.spec = replace(spec, views=spec.views | {PARTS: [len(each) for each in views]})
        if self.is_partial:
            check_same_images(self.place, self.manifest, self.present)
        of_part: dict[int, list[int]] = {number: [] for number in here}
        for index in self.present:
            of_part[self._part_of[index]].append(index)
        self.parts = tuple(LabelSet(self.storage, self.manifest, tuple(each), whole=self) for each in of_part.values())

    def only_part(self) -> "LabelSet":
        """Itself, for work that takes label maps with all of their views in one shard.

        Raises:
            InputError: shards hold some of the views.
        """
        if len(self.parts) > 1:
            first, last = self.spec.first_view, self.spec.first_view + len(self.spec.parts[0]) - 1
            raise InputError(
                f"{self.place} holds its views in {len(self.parts)} parts, and this takes one of them: pull it into a "
                f'folder of its own with `pull(views="{first}-{last}")`'
            )
        return self

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hexadecimal, as above."""
        return sha256_bytes(self.manifest.to_bytes() + (present_bytes(self.present) if self.is_partial else b""))

    @property
    def is_partial(self) -> bool:
        """Whether only some of the shards are here."""
        return len(self.present) < len(self.shards)

    @property
    def lacks_shards(self) -> bool:
        """Whether only some of the shards of the views that are here are."""
        views = {self._part_of[index] for index in self.present}
        return len(self.present) < sum(part in views for part in self._part_of)

    def __len__(self) -> int:
        return sum(self.shards[index].samples for index in self.parts[0].present)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> LabelMap:
        """The label map of one image. Reads its whole shard, and keeps that for the next call.

        Raises:
            UnknownKeyError: no label for this key; a `JoinError` and a `KeyError`.
            FormatError: the shard is damaged.
        """
        if len(self.parts) > 1:
            return join_views([part[key] for part in self.parts])
        place = self._places.get(key)
        if place is None:
            where = f"; only the shards {format_ranges(self.present)} are here" if self.lacks_shards else ""
            raise UnknownKeyError(
                f"the label set {self.place} has no label for the key {key!r}; it has {len(self)} others{where}"
            )
        index, row = place
        with self._lock:
            if self._last is None or self._last[0] != index:
                self._last = (index, self.read_shard(index))
            arrays = self._last[1]
        return arrays.label_map(row, self.spec)

    def shard_of(self, key: str) -> int:
        """The number of the shard that holds a key's labels; raises KeyError where there are none."""
        return self._places[key][0]

    def items(self) -> ItemsView[str, LabelMap]:
        """Every key with its label map, in stored order; each shard is read once."""
        return _Items(self)

    def values(self) -> ValuesView[LabelMap]:
        """Every label map, in stored order; each shard is read once."""
        return _Values(self)

    # A mapping's own comparison would read every label of both sets.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __reduce__(self) -> tuple[type, tuple]:
        # What a worker process needs to open the set itself: neither the lock nor what is in memory.
        return type(self), (self.storage, self.manifest, self.present)

    def __repr__(self) -> str:
        grid = "×".join(map(str, self.spec.grid))
        some = f", shards {format_ranges(self.present)} of {len(self.shards)}" if self.is_partial else ""
        return f"LabelSet({self.place!r}: {len(self)} images, {grid} tokens, {of_cell(self.spec)}{some})"

    @cached_property
    def _keys(self) -> list[str]:
        self.fetch()
        keys = [key for index in self.parts[0].present for key in self.read_index(index).keys]
        self.check_unique()
        return keys

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        keys = iter(self._keys)
        for index in self.parts[0].present:
            for row in range(self.shards[index].samples):
                places[next(keys)] = (index, row)
        return places

    def key_hashes(self, index: int) -> np.ndarray:
        """`hash_keys` of the keys of shard ``index``, uint64 (n,); they are read if they were not yet."""
        if index not in self._hashes:
            self.read_index(index)
        return self._hashes[index]

    def check_unique(self, indices: Iterable[int] = ()) -> None:
        """Raise FormatError where two shards hold the same key.

        Compared are the shards that were read so far, and those of ``indices``, whose keys are read if they were not.
        Every command that reads labels calls this after its last shard, so that no shard is read for it twice.
        """
        for index in indices:
            self.key_hashes(index)
        for part in range(len(self._part_specs)):
            self._check_unique(sorted(index for index in self._hashes if self._part_of[index] == part))

    def _check_unique(self, read: list[int]) -> None:
        twice = find_duplicates(
            [self._hashes[index] for index in read], lambda position: self.read_index(read[position]).keys
        )
        if twice.count:
            named = [
                f"{key} in {self.shards[read[first]].name} and {self.shards[read[second]].name}"
                for key, first, second in twice.examples
            ]
            raise FormatError(
                f"the label set {self.place} holds {twice.count:,} keys twice ({some(twice.count, named)}); make it "
                "again, with one label for each image"
            )

    def read_bytes(self, index: int, *, keep: bool = True, fresh: bool = False) -> bytes:
        """The bytes of shard ``index``, compared with its record. A store's shard is kept on this machine (``keep``).

        fresh: read the store's own, whatever is kept.

        Raises:
            FormatError: the file is missing, has another size or another SHA-256 than the manifest says.
            InputError: the store cannot be reached.
        """
        shard = self.shards[index]
        kept = self._kept(shard)
        if kept is not None and not fresh:
            with contextlib.suppress(OSError):
                data = kept.read_bytes()
                if sha256_bytes(data) == shard.sha256:
                    return data
        for attempt in range(_FETCHES):
            data = self._read(index)
            if len(data) == shard.bytes and sha256_bytes(data) == shard.sha256:
                break
            if kept is None or attempt == _FETCHES - 1:
                self._check_size(shard, len(data))
                raise FormatError(
                    f"the shard {self.place}/{shard.name} is damaged (its SHA-256 differs); copy it again"
                )
        if kept is not None and keep:
            make_folder(kept.parent)
            atomic_write(kept, data)
        return data

    def kept(self, index: int) -> Path | None:
        """Where shard ``index`` of an object store is kept on this machine; None for a folder's."""
        return self._kept(self.shards[index])

    def fetch(self) -> None:
        """Fetch every shard of an object store into the cache, several at a time. Does nothing for a folder."""
        wanted = [index for index in self.present if not self._is_here(index)]
        for _ in each_shard(lambda index: len(self.read_bytes(index)), wanted, f"{self.place} → cache", transfer=True):
            pass

    def read_shard(self, index: int) -> ShardArrays:
        """All labels of shard ``index``, in sample order, every byte and every value checked.

        Raises:
            FormatError: as `read_bytes`; or the content does not fit the manifest.
        """
        return self.decode(index, self.read_bytes(index))

    def read_whole(self, index: int) -> bytes:
        """The bytes of shard ``index`` as they are, to be copied into another label set; raises as `read_shard`."""
        data = self.read_bytes(index, keep=False)
        self.decode(index, data)
        return data

    def spec_of(self, index: int) -> LabelSpec:
        """What shard ``index`` holds: the set's spec, of some of the views where they lie in several parts."""
        return self._part_specs[self._part_of[index]]

    def decode(self, index: int, data: bytes) -> ShardArrays:
        """The labels in the bytes of shard ``index``; raises FormatError where they do not fit the manifest."""
        shard = self.shards[index]
        try:
            arrays = decode_shard(data, self.spec_of(index))
        except FormatError as error:
            raise FormatError(f"{self.place}/{shard.name}: {error}") from error
        self._check_count(shard, len(arrays))
        self._hashes[index] = hash_keys(arrays.keys)
        return arrays

    def read_index(self, index: int) -> ShardIndex:
        """Keys, content hashes and class ids of shard ``index``, without reading its labels. Raises FormatError."""
        shard = self.shards[index]
        if self.storage.local is None:
            # The whole shard is needed sooner or later, and is kept.
            source: bytes | Path = self.read_bytes(index)
        else:
            self._check_present(index)
            source = self.storage.path(shard.name)
            if source.exists():
                self._check_size(shard, source.stat().st_size)
        try:
            found = read_shard_index(source, self.spec_of(index))
            check_index(found.keys, found.class_ids, self.spec)
        except FormatError as error:
            raise FormatError(f"{self.place}/{shard.name}: {error}") from error
        self._check_count(shard, len(found.keys))
        self._hashes[index] = hash_keys(found.keys)
        return found

    def _read(self, index: int) -> bytes:
        self._check_present(index)
        shard = self.shards[index]
        try:
            # What a record says of the size is only believed once the file agrees.
            size = self.storage.size(shard.name)
            if size is not None:
                self._check_size(shard, size)
            return self.storage.read(shard.name, shard.bytes)
        except FileNotFoundError as error:
            raise FormatError(f"the shard {self.place}/{shard.name} is missing; copy the label set again") from error

    def _is_here(self, index: int) -> bool:
        kept = self._kept(self.shards[index])
        return kept is None or kept.exists()

    def _check_present(self, index: int) -> None:
        if self.is_partial and index not in self.present:
            raise FormatError(
                f"shard {index} of {self.place} was not pulled (the shards {format_ranges(self.present)} were); "
                f'pull it from its source with `pull(shards="{index}")`'
            )

    def _check_count(self, shard: ShardRecord, count: int) -> None:
        if count != shard.samples:
            raise FormatError(
                f"the shard {self.place}/{shard.name} holds {count} samples, the manifest says {shard.samples}"
            )

    def _check_size(self, shard: ShardRecord, size: int) -> None:
        if size != shard.bytes:
            raise FormatError(
                f"the shard {self.place}/{shard.name} has {size} bytes, the manifest says {shard.bytes}; copy it again"
            )

    def _kept(self, shard: ShardRecord) -> Path | None:
        """The path at which a shard of an object store is cached, named by content; None for a folder's shards."""
        return cache_dir() / "shards" / shard.sha256 if self.storage.local is None else None


class _Items(ItemsView[str, LabelMap]):
    def __iter__(self) -> Iterator[tuple[str, LabelMap]]:
        for label_map in _Values(self._mapping):
            yield label_map.key, label_map


class _Values(ValuesView[LabelMap]):
    def __iter__(self) -> Iterator[LabelMap]:
        label_set: LabelSet = self._mapping
        if len(label_set.parts) > 1:
            for maps in zip(*(part.values() for part in label_set.parts), strict=True):
                yield join_views(maps)
            return
        for index in label_set.present:
            arrays = label_set.read_shard(index)
            for row in range(len(arrays)):
                yield arrays.label_map(row, label_set.spec)
        label_set.check_unique()


def open_label_set(place: str | Path, **options: object) -> LabelSet:
    """Open the label set in a folder, or at a URL that fsspec knows (``options`` go to it).

    Shards of a URL are fetched when they are needed, and kept in `stl_offline.files.cache_dir`.

    Raises:
        InputError: the folder does not exist, or the store cannot be reached.
        MissingExtraError: the package for this kind of store is not installed.
        FormatError: no label set is there, one of an unknown version, or one that is not finished (the message says
            how many shards are done).
    """
    storage = open_storage(place, **options)
    if storage.local is not None and not storage.local.is_dir():
        raise InputError(f"there is no label set at {place}: not a folder")
    with contextlib.suppress(FileNotFoundError):
        manifest = read_manifest(storage)
        return LabelSet(storage, manifest, read_present(storage, len(manifest.shards)))
    if storage.size(PULL) is not None:
        raise FormatError(
            f"the label set {storage.place} was not pulled completely; run the same 'stl-offline labels pull' again"
        )
    try:
        spec, sizes = read_job(storage)
    except FileNotFoundError:
        raise FormatError(f"{storage.place} holds no label set: it has no {MANIFEST}") from None
    done = len(Records(storage, len(sizes), spec.container).all_recorded())
    raise FormatError(
        f"the label set {storage.place} is not finished: {done} of {len(sizes)} shards are done; "
        "run the command that makes it again, it goes on from there"
    )
