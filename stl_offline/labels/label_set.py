"""Reads a label set: by key for looking at it, by whole shards for work."""

import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from stl_offline.errors import FormatError, InputError, JoinError
from stl_offline.files import atomic_write, cache_dir, make_folder, sha256_bytes
from stl_offline.labels import containers
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.folder import MANIFEST, RECORDS, read_job, read_manifest
from stl_offline.labels.label_map import LabelMap
from stl_offline.labels.manifest import Manifest, ShardRecord
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.storage import Storage, open_storage


class LabelSet:
    """A label set that is whole. Made by `open_label_set`.

    ``len(labels)``: pictures; ``labels.keys``: their keys, in stored order; ``labels[key]``: a `LabelMap`;
    ``key in labels``; ``labels.spec``; ``labels.shards``: the shard table; ``labels.fingerprint``: SHA-256 of the
    manifest, which names every shard's SHA-256, and so names the whole content.
    """

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self.storage = storage
        self.place = storage.place
        self.spec: LabelSpec = manifest.spec
        self.shards: tuple[ShardRecord, ...] = manifest.shards
        self.fingerprint = sha256_bytes(manifest.to_bytes())
        self._last: tuple[int, ShardArrays] | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.spec.num_samples

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys)

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> LabelMap:
        """The label map of one picture. Reads its whole shard, and keeps that for the next call.

        Raises:
            JoinError: no label for this key.
            FormatError: the shard is damaged.
        """
        place = self._places.get(key)
        if place is None:
            raise JoinError(f"the label set {self.place} has no label for the key {key!r}; it has {len(self)} others")
        index, row = place
        with self._lock:
            if self._last is None or self._last[0] != index:
                self._last = (index, self.read_shard(index))
            arrays = self._last[1]
        return LabelMap(
            key=key,
            class_id=int(arrays.class_id[row]),
            content_hash=int(arrays.content_hash[row]),
            class_ids=arrays.class_ids[row],
            logits=arrays.logits[row],
            confidence=arrays.confidence[row],
            views=arrays.views[row],
            num_classes=self.spec.num_classes,
        )

    def __repr__(self) -> str:
        grid = "×".join(map(str, self.spec.grid))
        return f"LabelSet({self.place!r}: {len(self)} pictures, {grid} tokens, top {self.spec.top_k})"

    @cached_property
    def keys(self) -> list[str]:
        """Every picture's key, in stored order."""
        return [key for index in range(len(self.shards)) for key in self.read_index(index)[0]]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        places: dict[str, tuple[int, int]] = {}
        keys = iter(self.keys)
        for index, shard in enumerate(self.shards):
            for row in range(shard.samples):
                places[next(keys)] = (index, row)
        if len(places) != len(self):
            raise FormatError(f"the label set {self.place} holds {len(self) - len(places)} keys twice")
        return places

    def read_bytes(self, index: int) -> bytes:
        """The bytes of shard ``index``, compared with its record.

        Raises:
            FormatError: the file is missing, has another size or another SHA-256 than the manifest says.
        """
        shard = self.shards[index]
        kept = self._kept(shard)
        if kept is not None and kept.exists():
            data = kept.read_bytes()
            if sha256_bytes(data) == shard.sha256:
                return data
        try:
            data = self.storage.read(shard.name)
        except FileNotFoundError as error:
            raise FormatError(f"the shard {self.place}/{shard.name} is missing; copy the label set again") from error
        self._check_size(shard, len(data))
        if sha256_bytes(data) != shard.sha256:
            raise FormatError(f"the shard {self.place}/{shard.name} is damaged (its SHA-256 differs); copy it again")
        if kept is not None:
            make_folder(kept.parent)
            atomic_write(kept, data)
        return data

    def read_shard(self, index: int) -> ShardArrays:
        """All labels of shard ``index``, in sample order, every byte and every value checked.

        Raises:
            FormatError: as `read_bytes`; or the content does not fit the manifest.
        """
        arrays = self._decode(index, self.read_bytes(index))
        if len(arrays) != self.shards[index].samples:
            raise FormatError(
                f"the shard {self.shards[index].name} holds {len(arrays)} samples, "
                f"the manifest says {self.shards[index].samples}"
            )
        return arrays

    def read_index(self, index: int) -> tuple[list[str], np.ndarray]:
        """Keys and content hashes (uint64) of shard ``index``, without reading its labels. Raises FormatError."""
        shard = self.shards[index]
        if self.storage.local is None:
            # The whole shard is needed sooner or later, and is kept.
            source: bytes | Path = self.read_bytes(index)
        else:
            source = self.storage.local / shard.name
            if source.exists():
                self._check_size(shard, source.stat().st_size)
        try:
            keys, content_hashes = containers.read_index(source, self.spec)
        except FormatError as error:
            raise FormatError(f"{self.place}/{shard.name}: {error}") from error
        if len(keys) != shard.samples:
            raise FormatError(
                f"the shard {self.place}/{shard.name} holds {len(keys)} samples, the manifest says {shard.samples}"
            )
        return keys, content_hashes

    def _decode(self, index: int, data: bytes) -> ShardArrays:
        try:
            return containers.decode(data, self.spec)
        except FormatError as error:
            raise FormatError(f"{self.place}/{self.shards[index].name}: {error}") from error

    def _check_size(self, shard: ShardRecord, size: int) -> None:
        if size != shard.bytes:
            raise FormatError(
                f"the shard {self.place}/{shard.name} has {size} bytes, the manifest says {shard.bytes}; copy it again"
            )

    def _kept(self, shard: ShardRecord) -> Path | None:
        """Where a shard from an object store is kept on this machine, by content; None for a folder's shards."""
        return cache_dir() / "shards" / shard.sha256 if self.storage.local is None else None


def open_label_set(place: str | Path, **options: object) -> LabelSet:
    """Open the label set in a folder, or at a URL that fsspec knows (``options`` go to it).

    Shards of a URL are fetched when they are needed, and kept in `stl_offline.files.cache_dir`.

    Raises:
        InputError: there is no such folder, or the store cannot be reached.
        FormatError: no label set is there, one of an unknown version, or one that is not finished (the message says
            how many shards are done).
    """
    storage = open_storage(place, **options)
    if storage.local is not None and not storage.local.is_dir():
        raise InputError(f"there is no label set at {place}: not a folder")
    try:
        return LabelSet(storage, read_manifest(storage))
    except FileNotFoundError:
        pass
    try:
        _, sizes = read_job(storage)
    except FileNotFoundError:
        raise FormatError(f"{storage.place} holds no label set: it has no {MANIFEST}") from None
    done = len([name for name in storage.names(RECORDS) if name.endswith(".json")])
    raise FormatError(
        f"the label set {storage.place} is not finished: {done} of {len(sizes)} shards are done; "
        "run the command that makes it again, it goes on from there"
    )
