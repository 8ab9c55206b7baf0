"""Writes a label set shard by shard. A kill at any instant loses no finished shard and leaves no partial one.

While a job runs, the folder holds finished shards and `.partial/`: the settings (`job.json`), the lock, and one record
for each finished shard. A shard is written to a temporary name, renamed, and exists once its record does. At the end
`manifest.json` is put together from the records, and `.partial/` goes. Nothing that is written depends on the clock,
the folder's name or the number of processes: the same input gives the same bytes.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Self

from stl_offline.errors import FormatError, InputError, TargetError
from stl_offline.files import canonical_json, make_folder, sha256_bytes
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.card import make_card
from stl_offline.labels.format import encode_shard
from stl_offline.labels.manifest import Manifest, ShardRecord, shard_name, shard_range
from stl_offline.labels.spec import LabelSpec, differences
from stl_offline.labels.store import (
    CARD,
    JOB,
    LOCK,
    MANIFEST,
    PARTIAL,
    RECORD_BYTES,
    RECORDS,
    JobLock,
    Lease,
    Storage,
    open_storage,
    read_job,
    read_manifest,
    read_object,
    record_name,
)


class LabelSetWriter:
    """Writes the label set ``path``, or continues one that a killed job left. Does nothing if the set is complete.

    Use it as a context manager, one per process of a job. Each shard must be written by one process: `todo` divides
    them by index.

    Args:
        path: the folder, created if it is missing; or a URL that fsspec supports, such as ``s3://bucket/labels``.
        spec: the settings; those of a job that is resumed must be the same.
        shards: number of shards of equal size (±1), or the size of each.
        job: an id that the processes of one job share; None: this process is the whole job. The first of several must
            have entered before the others do.
        options: for fsspec, where ``path`` is a URL.

    ``complete``: whether the label set was already complete.

    Raises:
        InputError: more shards than samples, or sizes that do not sum to the samples.
        TargetError: the folder holds something else or a label set with other settings (named), another job is
            writing there, or it cannot be written.
    """

    def __init__(
        self,
        path: str | Path,
        spec: LabelSpec,
        shards: int | Sequence[int],
        *,
        job: str | None = None,
        options: dict | None = None,
    ) -> None:
        self._sizes = _shard_sizes(shards, spec.num_samples)
        self._firsts = [0, *accumulate(self._sizes)]
        self._storage = open_storage(path, **(options or {}))
        self.place = self._storage.place
        self.spec = spec
        self.num_shards = len(self._sizes)
        self.complete = False
        self._job = job
        self._lock: JobLock | Lease | None = None

    def __enter__(self) -> Self:
        local = self._storage.local
        if local is not None:
            make_folder(local)
        self._check_content()
        if not self.complete:
            self._lock = (
                Lease(self._storage, self._job)
                if local is None
                else JobLock(self._storage.path(LOCK), self._job, self._clean)
            )
            try:
                # Again, now that nobody else changes it.
                self._check_content()
                if not self.complete and self._storage.size(JOB) is None:
                    self._storage.write(JOB, self._settings())
            except BaseException:
                self._release()
                raise
        if self.complete:
            self._release()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def shard_range(self, index: int) -> tuple[int, int]:
        """The half-open range of samples of shard ``index``."""
        return self._firsts[index], self._firsts[index + 1]

    def shard_name(self, index: int) -> str:
        """The file name of shard ``index``."""
        return shard_name(index, self.num_shards, self.spec.container)

    def is_done(self, index: int) -> bool:
        """Whether shard ``index`` is written, recorded, and as large as its record says."""
        return self.complete or self._record(index) is not None

    def missing(self) -> list[int]:
        """The shards that are not done yet, of all processes. Call `finish` once there are none."""
        missing = [index for index in range(self.num_shards) if not self.is_done(index)]
        if missing and self._storage.size(MANIFEST) is not None:
            # Another process of this job has finished the label set meanwhile, and taken the records away.
            self._check_content()
            return []
        return missing

    def todo(self, rank: int = 0, processes: int = 1) -> list[int]:
        """The shards that are not done and belong to process ``rank``: every ``processes``-th by index."""
        return [index for index in range(rank, self.num_shards, processes) if not self.is_done(index)]

    def write_shard(self, index: int, arrays: ShardArrays) -> ShardRecord:
        """Encode and store shard ``index``: temporary file, rename, then the record that makes it exist.

        Raises:
            FormatError: the arrays do not fit the spec or the shard's range.
            TargetError: the disk is full or cannot be written; shards that are done stay.
        """
        first, last = self.shard_range(index)
        if len(arrays) != last - first:
            raise FormatError(f"shard {index} holds samples {first} to {last}, got {len(arrays)} samples")
        return self.write_encoded(index, encode_shard(arrays, self.spec))

    def write_encoded(self, index: int, data: bytes) -> ShardRecord:
        """`write_shard` for bytes that `stl_offline.labels.format.encode_shard` gave (perhaps in another thread)."""
        if self._lock is None:
            raise TargetError(f"the label set {self.place} is not open for writing: it is complete or closed")
        self._lock.check()
        first, last = self.shard_range(index)
        record = ShardRecord(self.shard_name(index), first, last - first, len(data), sha256_bytes(data))
        # A shard that is written anew must not keep an older record while its file is replaced.
        self._storage.remove(self._record_name(index))
        self._storage.write(record.name, data)
        self._storage.write(self._record_name(index), canonical_json(record.to_json()))
        return record

    def finish(self) -> Manifest:
        """Write `manifest.json` once every shard is done, and remove `.partial/`.

        Any process of a job may call it, also several of them at once; the result is the same.

        Raises:
            TargetError: shards are missing (how many, and which first), or the folder cannot be written.
        """
        records = [self._record(index) for index in range(self.num_shards)]
        if None in records:
            missing = self.missing()
            if missing:
                raise TargetError(
                    f"{len(missing)} of {self.num_shards} shards of {self.place} are not written yet, the first is "
                    f"{missing[0]}; run the same command again to go on"
                )
            return read_manifest(self._storage)
        if self._lock is None:
            raise TargetError(f"the label set {self.place} is not open for writing")
        manifest = Manifest(self.spec, tuple(records))
        self._storage.write(CARD, make_card(manifest))
        self._storage.write(MANIFEST, manifest.to_bytes())
        self.complete = True
        self._storage.remove(PARTIAL)
        return manifest

    def _settings(self) -> bytes:
        return canonical_json({**self.spec.to_json(), "shard_samples": self._sizes})

    def _record_name(self, index: int) -> str:
        return record_name(index, self.num_shards, self.spec.container)

    def _record(self, index: int) -> ShardRecord | None:
        """The record of a finished shard, or None."""
        try:
            record = ShardRecord.from_json(read_object(self._storage, self._record_name(index), RECORD_BYTES))
        except (FileNotFoundError, ValueError):
            # No record, or one that tells nothing: the shard is written (again).
            return None
        first, last = self.shard_range(index)
        whole = (
            record.name == self.shard_name(index)
            and (record.first, record.samples) == (first, last - first)
            and self._storage.size(record.name) == record.bytes
        )
        return record if whole else None

    def _check_content(self) -> None:
        """Set ``complete``; raise `TargetError` if the folder holds something else."""
        try:
            manifest = read_manifest(self._storage)
        except FileNotFoundError:
            pass
        else:
            self._check_settings(manifest.spec, [shard.samples for shard in manifest.shards])
            missing = [shard.name for shard in manifest.shards if self._storage.size(shard.name) != shard.bytes]
            if missing:
                raise TargetError(
                    f"the label set {self.place} is damaged: {len(missing)} of its shards are missing or cut off, the "
                    f"first is {missing[0]}; remove its {MANIFEST} to write them again"
                )
            self.complete = True
            return
        try:
            self._check_settings(*read_job(self._storage))
        except FileNotFoundError:
            _check_foreign(self._storage)

    def _check_settings(self, theirs: LabelSpec, sizes: list[int]) -> None:
        found = [str(each) for each in differences(self.spec, theirs)]
        if len(sizes) != self.num_shards:
            found.append(f"shards is {self.num_shards} and {len(sizes)}")
        elif sizes != self._sizes:
            found.append("the sizes of the shards differ")
        if found:
            raise TargetError(
                f"{self.place} holds a label set with other settings (yours and its): {'; '.join(found)}; "
                "choose another folder or the same settings"
            )

    def _clean(self) -> None:
        """Remove the temporary files of a killed job."""
        for folder in ("", PARTIAL, RECORDS):
            for name in self._storage.names(folder):
                if name.startswith(".") and name.endswith(".tmp"):
                    self._storage.remove(f"{folder}/{name}" if folder else name)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if self.complete:
            # Also what a sibling process wrote while another one finished.
            self._storage.remove(PARTIAL)


def check_place(place: str | Path, **options: object) -> None:
    """Raise, before there is anything to write, what `LabelSetWriter` would raise of the place alone.

    Raises:
        TargetError: a file or a folder of other things lies there, or it cannot be written.
        FormatError: a part of the folder is a symbolic link.
    """
    storage = open_storage(place, **options)
    storage.check_writable()
    if storage.size(MANIFEST) is None and storage.size(JOB) is None:
        _check_foreign(storage)


def _check_foreign(storage: Storage) -> None:
    """Raise TargetError where things lie that are neither a label set nor a part of one."""
    others = [name for name in storage.names() if name != PARTIAL]
    if others:
        raise TargetError(
            f"{storage.place} is not empty and holds no label set ({others[0]} lies there); choose another place"
        )


def _shard_sizes(shards: int | Sequence[int], samples: int) -> list[int]:
    if isinstance(shards, int):
        if not 1 <= shards <= samples:
            raise InputError(f"the number of shards must lie between 1 and the {samples} samples, got {shards}")
        bounds = [shard_range(index, shards, samples) for index in range(shards)]
        return [last - first for first, last in bounds]
    sizes = [int(size) for size in shards]
    if not sizes or min(sizes) < 1 or sum(sizes) != samples:
        raise InputError(f"the sizes of the shards sum to {sum(sizes)}, the label set has {samples} samples")
    return sizes
