"""Adds shards to a label set that is complete. What is there stays as it is, byte for byte, and readable meanwhile.

The manifest is replaced last, and only if it is still the one that was there at first. Any number of processes may add
the same images at the same time, as any number may write a new set.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stl_offline.errors import InputError, JoinError, TargetError, counted
from stl_offline.files import canonical_json, images_fingerprint, sha256_bytes
from stl_offline.labels.arrays import ShardIndex
from stl_offline.labels.card import make_card
from stl_offline.labels.keys import some
from stl_offline.labels.label_set import LabelSet
from stl_offline.labels.manifest import SHARD_NAME, Manifest, ShardRecord, parse_object, shard_name
from stl_offline.labels.spec import LabelSpec, differences
from stl_offline.labels.store import CARD, JOB, MANIFEST, PARTIAL, PULL, Storage, job_settings, read_job, read_manifest
from stl_offline.labels.tar_writer import TarLabelWriter
from stl_offline.labels.writer import LabelSetWriter

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class OldImages:
    """The images of a label set, in its order: keys, class_ids (n,), content_hashes (n,)."""

    keys: list[str]
    class_ids: np.ndarray
    content_hashes: np.ndarray

    @classmethod
    def of(cls, label_set: LabelSet) -> "OldImages":
        """Reads the keys of every shard. Raises FormatError where the set is damaged."""
        label_set.fetch()
        found = [label_set.read_index(index) for index in label_set.present]
        label_set.check_unique()
        return cls(
            [key for each in found for key in each.keys],
            np.concatenate([each.class_ids for each in found]),
            np.concatenate([each.content_hashes for each in found]),
        )

    def new(self, keys: Sequence[str], class_ids: np.ndarray, content_hashes: np.ndarray, place: str) -> np.ndarray:
        """The places, int64 (m,), of the images that the set does not hold, of keys, class ids and contents, (n,) each.

        Raises:
            JoinError: images that the set holds have changed, or their classes have (counted, with examples).
        """
        rows = {key: row for row, key in enumerate(self.keys)}
        at = np.array([rows.get(key, -1) for key in keys], dtype=np.int64)
        for what, differ in (
            ("changed", self.content_hashes[at] != content_hashes),
            ("got other classes", self.class_ids[at] != class_ids),
        ):
            changed = np.flatnonzero((at >= 0) & differ)
            if len(changed):
                named = [keys[place] for place in changed[:3]]
                raise JoinError(
                    f"{counted(len(changed), 'image')} of {place} {'has' if len(changed) == 1 else 'have'} {what} "
                    f"since they were labelled ({some(len(changed), named)}), and shards are never written again; give "
                    "changed images other names, or label all of them to another place"
                )
        left = len(self.keys) - int((at >= 0).sum())
        if left:
            _LOGGER.info("%s that the label set holds are not in %s; their labels stay", counted(left, "image"), place)
        return np.flatnonzero(at < 0)


def check_settings(base: LabelSet, spec: LabelSpec, always: Sequence[str] = ()) -> None:
    """Raise TargetError where a dump with these settings cannot add to a label set; InputError for a part of one.

    always: the settings that are compared also with a set that does not record them.
    """
    if base.is_partial:
        raise InputError(f"only some shards of {base.place} are here; append to a whole label set")
    if len(base.parts) > 1:
        raise InputError(
            f"{base.place} is put together of several parts of views; append to one of them, and merge again"
        )
    found = [
        str(each)
        for each in differences(spec, base.spec)
        if each.name not in ("source.samples", "source.fingerprint")
        # Merged sets record what all of their parts have in common.
        and not (each.entry == "creation" and each.theirs is None and each.name not in always)
    ]
    if found:
        raise TargetError(f"{base.place} was made with other settings (yours and its): {'; '.join(found)}")


def remove_leftovers(base: LabelSet) -> None:
    """Remove what a process left that was killed after it had added its shards. A job that goes on stays."""
    storage = base.storage
    job = job_settings(storage)
    if job is None and storage.names(PARTIAL):
        # A job's settings are written before anything else: those of one that has begun since the first look are there.
        job = job_settings(storage) or {}
    if job is not None and job.get("after") != base.fingerprint and storage.size(PULL) is None:
        _write_card(storage, job.get("card"), base.manifest)
        storage.remove(PARTIAL)


def _write_card(storage: Storage, before: object, manifest: Manifest) -> None:
    """Write the card of a set that has grown, unless its publisher has edited it. before: the old card's SHA-256."""
    if storage.size(CARD) is None or sha256_bytes(storage.read(CARD)) == before:
        storage.write(CARD, make_card(manifest))


class _Appending(LabelSetWriter):
    """What is different where the first shards are there already. ``_base``: the set; ``_old``: its shards."""

    _base: LabelSet

    def shard_name(self, index: int) -> str:
        if index < self._old:
            return self._base.shards[index].name
        return shard_name(index, self.num_shards, self.spec.container)

    def _job(self) -> bytes:
        card = sha256_bytes(make_card(self._base.manifest))
        return canonical_json(parse_object(super()._job()) | {"after": self._base.fingerprint, "card": card})

    def _check_content(self) -> None:
        manifest = read_manifest(self._storage)
        if manifest == self._base.manifest:
            if not self._is_open:
                remove_leftovers(self._base)
            try:
                self._check_job(*read_job(self._storage))
            except FileNotFoundError:
                if self._is_open:
                    # Removed by a process that took it for a leftover, in the moment in which it was written; or by
                    # one that finished this job since the manifest was read.
                    there = self._storage.create(JOB, self._job())
                    if read_manifest(self._storage) != manifest:
                        if there == self._job():
                            self._storage.remove_file(JOB)
                        self._check_content()
        elif self._is_mine(manifest):
            self.complete = True
        else:
            raise TargetError(f"{self.place} has changed since this began to append; run the same command again")

    def _refuse(self, found: Sequence[str]) -> None:
        if found:
            named = {shard.name for shard in self._base.shards}
            begun = [name for name in self._storage.names() if SHARD_NAME.fullmatch(name) and name not in named]
            shards = f" and {some(len(begun), begun[:3])}, which {MANIFEST} does not name" if begun else ""
            raise TargetError(
                f"an append to {self.place} has begun and not ended, of other images or settings (yours and its): "
                f"{'; '.join(found)}; go on with the same ones, or give that append up: remove {PARTIAL}{shards}"
            )

    def _is_mine(self, manifest: Manifest) -> bool:
        """Whether this is the manifest with the shards that this job adds."""
        sizes = [shard.samples for shard in manifest.shards]
        return manifest.spec == self.spec and sizes == self._sizes

    def _is_finished(self) -> bool:
        self._check_content()
        return self.complete

    def _record(self, index: int, size: int | None) -> ShardRecord | None:
        # Old shards are neither looked at nor ever removed.
        return self._base.shards[index] if index < self._old else super()._record(index, size)

    def _store(self, manifest: Manifest) -> None:
        data, before = manifest.to_bytes(), self._base.manifest
        # As it lies there: another writer's JSON may have other white space.
        there = self._storage.read(MANIFEST)
        is_before = there != data and Manifest.from_bytes(there) == before
        if (self._storage.replace(MANIFEST, data, there) if is_before else there) != data:
            raise TargetError(f"{self.place} has changed since this began to append; run the same command again")
        _write_card(self._storage, sha256_bytes(make_card(before)), manifest)

    def _remove_partial(self) -> None:
        job = job_settings(self._storage)
        if job is not None and job.get("after") == self._base.fingerprint:
            _write_card(self._storage, job.get("card"), read_manifest(self._storage))
        super()._remove_partial()


class AppendWriter(_Appending):
    """Adds shards of these sizes to ``base``. source: of the set with them (`added_source`)."""

    def __init__(self, base: LabelSet, sizes: Sequence[int], source: dict[str, Any]) -> None:
        self._base, self._old = base, len(base.shards)
        spec = replace(base.spec, source=base.spec.source | source)
        super().__init__(base.place, spec, [shard.samples for shard in base.shards] + list(sizes))


class TarAppendWriter(_Appending, TarLabelWriter):
    """Adds a shard for each of these tars (base names) to ``base``."""

    def __init__(self, base: LabelSet, tars: Sequence[str]) -> None:
        self._base, self._old = base, len(base.shards)
        sizes = [shard.samples for shard in base.shards] + [1] * len(tars)
        super().__init__(base.place, base.spec, [shard.images for shard in base.shards] + list(tars), sizes=sizes)

    def _is_mine(self, manifest: Manifest) -> bool:
        ours = manifest.shards[: self._old] == self._base.shards
        return ours and [shard.images for shard in manifest.shards] == self.tars

    def _manifest(self, records: Sequence[ShardRecord]) -> Manifest:
        self._base.fetch()
        for index in range(self._old):
            found: ShardIndex = self._base.read_index(index)
            self._images[index] = self._images_of(found.keys, found.class_ids, found.content_hashes)
        return super()._manifest(records)


def added_source(
    base: LabelSet, old: OldImages, keys: Sequence[str], class_ids: np.ndarray, hashes: np.ndarray
) -> dict[str, Any]:
    """The source of a set with these images after the old ones; its fingerprint is that of a merged set."""
    fingerprint = images_fingerprint(
        base.spec.class_names,
        json.dumps([*old.keys, *keys]).encode(),
        np.concatenate([old.class_ids, class_ids]).astype("<i8").tobytes(),
        np.concatenate([old.content_hashes, hashes]).astype("<u8").tobytes(),
    )
    return {"samples": len(old.keys) + len(keys), "fingerprint": fingerprint}
