"""Writes a label set with one shard for each image tar. How many images a tar has is known once it is labelled.

Until the last shard is written, the job's settings hold the names of the tars in place of the number of images, and
each shard's record a hash of every key and a fingerprint of its images. From these the manifest is put together, and
keys that two tars share are found, without reading a shard again.
"""

import base64
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Self

import numpy as np

from stl_offline.errors import FormatError, InputError, JoinError, TargetError, counted
from stl_offline.files import canonical_json, images_fingerprint, sha256_bytes, sha256_parts
from stl_offline.labels.arrays import ShardArrays, ShardIndex
from stl_offline.labels.format import encode_shard, read_shard_index
from stl_offline.labels.keys import find_duplicates, hash_keys, some
from stl_offline.labels.manifest import Manifest, ShardRecord
from stl_offline.labels.spec import LabelSpec, differences
from stl_offline.labels.store import JOB, read_object
from stl_offline.labels.writer import LabelSetWriter

# A record holds 11 bytes for each image of its tar.
_RECORD_BYTES = 1 << 26
_JOB_BYTES = 1 << 26
# What is only known at the end.
_LATE = ("source.samples", "source.fingerprint")


@dataclass(frozen=True)
class _Images:
    """What is recorded of a tar's images. key_hashes: `hash_keys`, uint64 (n,)."""

    fingerprint: str
    key_hashes: np.ndarray


@dataclass(frozen=True)
class FirstImage:
    """The first image of a job's first tar. It tells the job's tars from others of the same names."""

    tar: str
    key: str
    content_hash: int

    def check(self, found: ShardIndex, place: str) -> None:
        """Raise TargetError where the shard of the tar of this name in ``place`` does not have this image."""
        hashes = dict(zip(found.keys, found.content_hashes.tolist(), strict=True))
        if hashes.get(self.key) != self.content_hash:
            raise TargetError(
                f"{place} holds the labels of another tar of the name {self.tar}: the first image of yours, "
                f"{self.key!r}, is not among its images, or has changed; label these tars to another place"
            )


class TarLabelWriter(LabelSetWriter):
    """A `LabelSetWriter` for shards whose sizes are not known beforehand, each of the images of one tar.

    Args:
        spec: the settings; ``source`` need hold no more than what `stl_offline.labels.spec.OWN_CLASSES` stands for.
        tars: base name of each shard's tar; None for a shard that is there and was not made of one.
        sizes: of the shards, 1 for those whose size is not known; all of them by default.
        first: compared with the shard of its tar where that is written already.

    Raises:
        InputError: two tars of one name.
    """

    def __init__(
        self,
        path: str | Path,
        spec: LabelSpec,
        tars: Sequence[str | None],
        *,
        sizes: Sequence[int] | None = None,
        first: FirstImage | None = None,
        options: dict | None = None,
    ) -> None:
        (name, count), *_ = Counter(filter(None, tars)).most_common(1)
        if count > 1:
            raise InputError(f"{count} of the tars are called {name!r}; the manifest names the tars: rename them")
        # One image for each tar stands for the number that is not known.
        sizes = [1] * len(tars) if sizes is None else list(sizes)
        named = sha256_parts(*((name or "").encode() for name in tars))
        source = spec.source | {"samples": sum(sizes), "fingerprint": named}
        super().__init__(path, replace(spec, source=source), sizes, options=options)
        self.tars = list(tars)
        self._first = first
        self._images: dict[int, _Images] = {}

    def __enter__(self) -> Self:
        super().__enter__()
        self.check_first(lambda index: self.complete or self._is_recorded(index))
        return self

    def check_first(self, is_written: Callable[[int], bool] = lambda index: True) -> None:
        """Raise TargetError where the shard of the first image's tar is written, and was made of another tar."""
        if self._first is not None and self._first.tar in self.tars:
            index = self.tars.index(self._first.tar)
            # A shard that is damaged or gone is found later on.
            with contextlib.suppress(FileNotFoundError, FormatError):
                if is_written(index):
                    found = read_shard_index(self._storage.read(self.shard_name(index)), self.spec)
                    self._first.check(found, self.place)

    def write_shard(self, index: int, arrays: ShardArrays) -> ShardRecord:
        """Encode and store shard ``index``, then the record that makes it exist. Raises as `LabelSetWriter`'s."""
        data = encode_shard(arrays, self.spec)
        record = ShardRecord(
            self.shard_name(index), 0, len(arrays), len(data), sha256_bytes(data), images=self.tars[index]
        )
        images = self._images_of(arrays.keys, arrays.class_id, arrays.content_hash)
        hashes = base64.b64encode(images.key_hashes.tobytes()).decode()
        text = canonical_json(record.to_json() | {"fingerprint": images.fingerprint, "key_hashes": hashes})
        return self._commit(index, record, data, text)

    def _images_of(self, keys: Sequence[str], class_ids: np.ndarray, content_hashes: np.ndarray) -> _Images:
        fingerprint = images_fingerprint(
            self.spec.class_names,
            json.dumps(list(keys)).encode(),
            class_ids.astype("<i8").tobytes(),
            content_hashes.astype("<u8").tobytes(),
        )
        return _Images(fingerprint, hash_keys(keys).astype("<u8"))

    def _job(self) -> bytes:
        return canonical_json({**self.spec.to_json(), "shard_samples": self._sizes, "tars": self.tars})

    def _read_record(self, index: int) -> ShardRecord | None:
        try:
            entries = read_object(self._storage, self._records.path(index), _RECORD_BYTES)
            record = ShardRecord.from_json(entries)
            hashes = np.frombuffer(base64.b64decode(entries["key_hashes"], validate=True), "<u8")
            images = _Images(str(entries["fingerprint"]), hashes)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if (record.name, record.images, record.samples) != (self.shard_name(index), self.tars[index], len(hashes)):
            return None
        self._images[index] = images
        return record

    def _manifest(self, records: Sequence[ShardRecord]) -> Manifest:
        images = [self._images[index] for index in range(len(records))]
        self._check_keys([each.key_hashes for each in images])
        firsts = accumulate((record.samples for record in records), initial=0)
        samples = sum(record.samples for record in records)
        fingerprint = sha256_parts(*(each.fingerprint.encode() for each in images))
        spec = replace(self.spec, source=self.spec.source | {"samples": samples, "fingerprint": fingerprint})
        placed = (replace(record, first=first) for record, first in zip(records, firsts, strict=False))
        return Manifest(spec, tuple(placed))

    def _check_keys(self, hashes: list[np.ndarray]) -> None:
        twice = find_duplicates(hashes, self._keys)
        if twice.count:
            named = [
                f"{key} in {self._named(first)} and {self._named(second)}" for key, first, second in twice.examples
            ]
            raise JoinError(
                f"{counted(twice.count, 'key')} {'is' if twice.count == 1 else 'are'} in these tars twice "
                f"({some(twice.count, named)}); every image needs a key of its own: label other tars, to another place"
            )

    def _named(self, index: int) -> str:
        return self.tars[index] or self.shard_name(index)

    def _keys(self, index: int) -> Sequence[str]:
        return read_shard_index(self._storage.read(self.shard_name(index)), self.spec).keys

    def check_manifest(self, manifest: Manifest) -> None:
        found = [str(each) for each in differences(self.spec, manifest.spec) if each.name not in _LATE]
        self._refuse(found + self._other_tars([shard.images for shard in manifest.shards]))

    def _check_job(self, theirs: LabelSpec, sizes: list[int]) -> None:
        found = [str(each) for each in differences(self.spec, theirs) if each.name not in _LATE]
        self._refuse(found + self._other_tars(read_object(self._storage, JOB, _JOB_BYTES).get("tars")))

    def _other_tars(self, theirs: object) -> list[str]:
        if theirs == self.tars:
            return []
        theirs = theirs if isinstance(theirs, list) else []
        if not any(theirs):
            return ["data is tars and was not"]
        if len(theirs) != len(self.tars):
            return [f"data is {len(self.tars):,} tars and {len(theirs):,}"]
        ours, other = next(pair for pair in zip(self.tars, theirs, strict=True) if pair[0] != pair[1])
        return [f"data has the tar {ours} and {other}"]
