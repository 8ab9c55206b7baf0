"""Writes a label set shard by shard. A kill at any instant loses no finished shard and leaves no partial one.

While a job runs, the folder holds finished shards and `.partial/`: the settings (`job.json`), one record for each
finished shard, and the claims of the workers. Any number of processes on any number of machines may write one set:

- Every file is created whole, and only where there is none. Where a shard is there already, its bytes are compared.
- A shard exists once its record does. At the end `manifest.json` is put together from the records; `.partial/` goes.
- `LabelSetWriter.claim_shards` divides the shards among processes that do not know of each other.

Nothing that is written depends on the clock, the folder's name or the number of processes: the same input gives the
same bytes.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from stl_offline.errors import FormatError, InputError, StlError, TargetError, counted
from stl_offline.files import canonical_json, make_folder, remove_leftovers, sha256_bytes
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.card import make_card
from stl_offline.labels.format import encode_shard
from stl_offline.labels.manifest import Manifest, ShardRecord, parse_object, shard_name, shard_range
from stl_offline.labels.spec import LabelSpec, differences
from stl_offline.labels.store import (
    CARD,
    CLAIMS,
    JOB,
    MANIFEST,
    PARTIAL,
    RECORD_BYTES,
    RECORDS,
    SOME_SHARDS,
    TRANSFERS,
    Claims,
    Records,
    Storage,
    job_settings,
    open_storage,
    pick_start,
    read_job,
    read_manifest,
    read_object,
)

# A worker that waits for others looks again after so long, then after twice as long, up to a maximum: listings of an
# object store are paid for.
_FIRST_WAIT_SECONDS = 0.05
_LONGEST_WAIT_SECONDS, _LONGEST_STORE_WAIT_SECONDS = 1.0, 30.0
# Temporary files that have not changed for so long are those of killed processes, also where locks do not reach from
# one machine to another.
_LEFTOVER_SECONDS = 3600.0


class LabelSetWriter:
    """Writes the label set ``path``, or continues one that other processes have begun. Does nothing if it is complete.

    Use it as a context manager. Several processes may write one set at the same time: `claim_shards` divides the work,
    and where two have written the same shard all the same, their bytes are compared.

    Args:
        path: the folder, created if it is missing; or a URL that fsspec supports, such as ``s3://bucket/labels``.
        spec: the settings; those of a job that is resumed or joined must be the same.
        shards: number of shards of equal size (±1), or the size of each.
        options: for fsspec, where ``path`` is a URL.

    ``complete``: whether the label set was already complete.

    Raises:
        InputError: more shards than samples, or sizes that do not sum to the samples.
        TargetError: the folder holds something else or a label set with other settings (named), or it cannot be
            written.
    """

    # The first shards, where they were there before the job began (`stl_offline.labels.append`).
    _old = 0

    def __init__(
        self,
        path: str | Path,
        spec: LabelSpec,
        shards: int | Sequence[int],
        *,
        options: dict | None = None,
    ) -> None:
        self._sizes = _shard_sizes(shards, spec.num_samples, len(spec.parts))
        self._firsts = [first % spec.num_samples for first in itertools.accumulate(self._sizes, initial=0)]
        self._storage = open_storage(path, **(options or {}))
        self.place = self._storage.place
        self.spec = spec
        self.num_shards = len(self._sizes)
        self.complete = self._is_open = False
        self._claims: Claims | None = None
        self._checked: list[ShardRecord | None] = []
        self._records = Records(self._storage, self.num_shards, spec.container, first=self._old)

    def __enter__(self) -> Self:
        if self._storage.local is not None:
            make_folder(self._storage.local)
        self._check_content()
        if not self.complete and self._storage.size(JOB) is None:
            self._storage.create(JOB, self._job())
            # Another process may have been first, with other settings.
            self._check_content()
        self._clean(0.0 if self.complete else _LEFTOVER_SECONDS)
        self._is_open = not self.complete
        if self.complete:
            self._remove_partial()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        if self._claims is not None:
            given_up = self._claims.held - {self.num_shards}
            self._claims.__exit__(kind, error, trace)
            if given_up and not self.complete:
                # Where the store does not answer, these shards are found at the end.
                with contextlib.suppress(StlError, OSError):
                    self._records.reopen(given_up)
        if self.complete and self._storage.size(JOB) is None:
            # What this process wrote after another one had finished the set.
            self._storage.remove(PARTIAL)

    def shard_range(self, index: int) -> tuple[int, int]:
        """The half-open range of samples of shard ``index``."""
        return self._firsts[index], self._firsts[index] + self._sizes[index]

    def shard_name(self, index: int) -> str:
        """The file name of shard ``index``."""
        return shard_name(index, self.num_shards, self.spec.container)

    def is_done(self, index: int) -> bool:
        """Whether shard ``index`` is written, recorded, and as large as its record says."""
        return self.complete or self._record(index, self._storage.size(self.shard_name(index))) is not None

    def missing(self) -> list[int]:
        """The shards that are not done yet, of all processes. Call `finish` once there are none."""
        records = [] if self.complete else self._read_records()
        missing = [index for index, record in enumerate(records) if record is None]
        # Or another process has finished the label set meanwhile, and taken the records away.
        return [] if missing and self._is_finished() else missing

    def unrecorded(self) -> list[int]:
        """About `missing`, from a few listings: shards whose files were damaged since they were written count as done,
        and of many thousand shards it is an estimate (`Records.left`)."""
        return [] if self.complete else self._records.left()

    def todo(self, rank: int = 0, processes: int = 1) -> list[int]:
        """The shards that are not done and belong to process ``rank``: every ``processes``-th by index."""
        return [index for index in self.missing() if index % processes == rank]

    def claim_shards(self) -> Iterator[int]:
        """The shards that this process is to write, until all are done: call `finish` then.

        Any number of processes may do so at the same time. Each shard goes to one of them. A shard that is being
        written by another process, or by a thread of this one, is waited for. It is taken over when its process has
        stopped (`Claims`).
        """
        for shard in self.claim_ahead():
            if shard is None:
                time.sleep(_FIRST_WAIT_SECONDS)
            else:
                yield shard

    def claim_ahead(self) -> Iterator[int | None]:
        """`claim_shards` for a caller that asks for further shards before it has written those that it was given.

        Once no shard is free, None is given in place of a further one. The caller has to write all that it was given
        before it asks again, as other processes wait for them.
        """
        if self.complete:
            return
        self._claims = Claims(self._storage).__enter__()
        is_local, is_shared = self._storage.local is not None, False
        wait, longest = _FIRST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS if is_local else _LONGEST_STORE_WAIT_SECONDS
        others: dict[int, str] = {}
        block, goes_on = None, False
        while True:
            # Claims first: a shard that is committed between the two listings is in both of them, not in none. The
            # manifest last: records go once it is there. To go on in its block, a worker needs no new claims.
            others = others if goes_on else self._others()
            is_shared = is_shared or bool(others)
            taken = others.keys() | self._claims.held
            block, free = self._records.find_free(block, taken, is_shared=is_shared, are_new=not goes_on)
            if self._is_finished():
                return
            if not free and goes_on:
                goes_on = False
                continue
            if not free and self._claims.held:
                yield None
                continue
            start = pick_start(free) if free and is_shared else 0
            first = free[start] if free else None
            goes_on = False
            for index in free[start:] + free[:start] or self._left(others):
                if not self._claims.take(index, others.get(index)):
                    is_shared = True
                    # Many workers look here, if not even the first one was to be had.
                    block = None if index == first else block
                    break
                if index < self.num_shards:
                    # Since the listings it may have been written and its claim released, or the whole set finished.
                    if self._is_recorded(index) or self._is_finished():
                        self._claims.release(index)
                        if self.complete:
                            return
                        # The next ones are likely written, too, and each look at one costs requests.
                        goes_on = is_shared = True
                        break
                    wait = _FIRST_WAIT_SECONDS
                    yield index
                elif self._all_whole():
                    return
                else:
                    self._claims.release(index)
            else:
                goes_on = bool(free)
            if goes_on:
                continue
            time.sleep(wait)
            wait = min(2 * wait, longest)

    def write_shard(self, index: int, arrays: ShardArrays) -> ShardRecord:
        """Encode and store shard ``index``, then the record that makes it exist.

        Raises:
            FormatError: the arrays do not fit the spec or the shard's range.
            TargetError: the disk is full or cannot be written; shards that are done stay. Or the shard is there with
                other bytes (both checksums are named).
        """
        first, last = self.shard_range(index)
        if len(arrays) != last - first:
            raise FormatError(f"shard {index} holds samples {first} to {last}, got {len(arrays)} samples")
        return self.write_encoded(index, encode_shard(arrays, self.spec))

    def write_encoded(self, index: int, data: bytes, images: str | None = None) -> ShardRecord:
        """`write_shard` for bytes that `stl_offline.labels.format.encode_shard` gave (perhaps in another thread).

        images: the tar that the shard is of, as `ShardRecord` has it.
        """
        first, last = self.shard_range(index)
        record = ShardRecord(self.shard_name(index), first, last - first, len(data), sha256_bytes(data), images)
        return self._commit(index, record, data, canonical_json(record.to_json()))

    def _commit(self, index: int, record: ShardRecord, data: bytes, text: bytes) -> ShardRecord:
        """Store a shard, then its record as it is written (``text``)."""
        if not self._is_open:
            raise TargetError(f"the label set {self.place} is not open for writing: it is complete or closed")
        recorded = self._read_record(index)
        if recorded is not None:
            self._check_same(record, recorded.sha256)
        stored = self._storage.create(record.name, data)
        if stored != data:
            if recorded is None:
                self._check_same(record, sha256_bytes(stored))
            # Of the recorded shard, only damaged bytes are left.
            self._storage.write(record.name, data)
        if self._storage.create(self._records.path(index), text) != text:
            recorded = self._read_record(index)
            if recorded is not None:
                self._check_same(record, recorded.sha256)
            self._storage.write(self._records.path(index), text)
        if self._claims is not None:
            self._claims.release(index)
        return record

    def finish(self) -> Manifest:
        """Write `manifest.json` once every shard is done, and remove `.partial/`.

        Any process may call it, also several of them at once; the result is the same.

        Raises:
            TargetError: shards are missing (how many, and which first), or the folder cannot be written.
        """
        if self.complete:
            return read_manifest(self._storage)
        records = self._checked or self._read_records()
        while None in records:
            missing = self.missing()
            if missing:
                raise TargetError(
                    f"{len(missing)} of {self.num_shards} shards of {self.place} are not written yet, the first is "
                    f"{missing[0]}; run the same command again to go on"
                )
            if self.complete:
                return read_manifest(self._storage)
            # Another process has written the last ones meanwhile.
            records = self._read_records()
        if not self._is_open:
            raise TargetError(f"the label set {self.place} is not open for writing")
        manifest = self._manifest(records)
        self._store(manifest)
        self.complete = True
        self._clean(0.0)
        self._remove_partial()
        return manifest

    def _remove_partial(self) -> None:
        """Remove `.partial/`, unless it is that of a job that appends to this one's shards.

        The settings go last: as long as they are there, other processes leave the rest alone.
        """
        for name in (RECORDS, CLAIMS, JOB, PARTIAL):
            job = job_settings(self._storage)
            if job is not None and job.get("after") != parse_object(self._job()).get("after"):
                return
            if job is not None or name == PARTIAL:
                self._storage.remove(name)

    def _job(self) -> bytes:
        """What is written when the job begins, for other processes to compare with."""
        return canonical_json({**self.spec.to_json(), "shard_samples": self._sizes})

    def _manifest(self, records: Sequence[ShardRecord]) -> Manifest:
        """The manifest of all shards."""
        return Manifest(self.spec, tuple(records))

    def _store(self, manifest: Manifest) -> None:
        """Write the card and, last, the manifest."""
        self._storage.write(CARD, make_card(manifest))
        if self._storage.create(MANIFEST, manifest.to_bytes()) != manifest.to_bytes():
            raise TargetError(f"{self.place}/{MANIFEST} is there with other content; remove it to write it again")

    def _read_record(self, index: int) -> ShardRecord | None:
        """The record of a shard; None where there is none that can be used."""
        try:
            record = ShardRecord.from_json(read_object(self._storage, self._records.path(index), RECORD_BYTES))
        except (FileNotFoundError, ValueError):
            return None
        first, last = self.shard_range(index)
        fits = (record.name, record.first, record.samples) == (self.shard_name(index), first, last - first)
        return record if fits else None

    def _record(self, index: int, size: int | None) -> ShardRecord | None:
        """The record of a shard whose file has the ``size`` that it names, or None."""
        record = self._read_record(index)
        return record if record is not None and record.bytes == size else None

    def _read_records(self, recorded: set[int] | None = None) -> list[ShardRecord | None]:
        """The records of all shards; None for those that are not done. ``recorded``: those that have one, if listed."""
        recorded = self._all_recorded() if recorded is None else recorded
        sizes = self._storage.sizes()

        def read(index: int) -> ShardRecord | None:
            return self._record(index, sizes.get(self.shard_name(index))) if index in recorded else None

        if self._storage.local is not None:
            return list(map(read, range(self.num_shards)))
        with ThreadPoolExecutor(TRANSFERS) as pool:
            return list(pool.map(read, range(self.num_shards)))

    def _is_finished(self) -> bool:
        """Whether another process has finished the label set."""
        if self._storage.size(MANIFEST) is None:
            return False
        with contextlib.suppress(FileNotFoundError):
            # Its shards have just been looked at by that process.
            self.check_manifest(read_manifest(self._storage))
            self.complete = True
        return self.complete

    def _others(self) -> dict[int, str]:
        """`Claims.others`, without what other jobs left there: numbers that this one does not write."""
        found = self._claims.others()
        return {index: name for index, name in found.items() if self._old <= index <= self.num_shards}

    def _left(self, others: dict[int, str]) -> list[int]:
        """What to take where no shard is free: those whose worker has stopped; the manifest (by the number after the
        last shard's) where nobody has a shard to write."""
        claimed = [index for index in others if index < self.num_shards]
        # A worker can have been stopped, or be busy, between a record and the end of its claim.
        if all(map(self._is_recorded, claimed)):
            claimed = [self.num_shards]
        return [index for index in claimed if index not in others or self._claims.is_dead(others[index])]

    def _all_recorded(self) -> set[int]:
        return self._records.all_recorded() | set(range(self._old))

    def _is_recorded(self, index: int) -> bool:
        return self._storage.size(self._records.path(index)) is not None

    def _all_whole(self) -> bool:
        """Whether every shard is as its record names it. What is not is removed, to be written again."""
        recorded = self._all_recorded()
        missing = [index for index in range(self.num_shards) if index not in recorded]
        self._records.reopen(missing)
        if missing:
            return False
        self._checked = self._read_records(recorded)
        damaged = [index for index, record in enumerate(self._checked) if record is None]
        if damaged and self._is_finished():
            return True
        for index in damaged:
            # As they are now: reading all records takes long, and another process may have written this shard again.
            record, size = self._read_record(index), self._storage.size(self.shard_name(index))
            if record is not None and record.bytes == size:
                continue
            if record is not None:
                self._storage.remove_file(self.shard_name(index))
            self._storage.remove_file(self._records.path(index))
        self._records.reopen(damaged)
        return not damaged

    def _check_same(self, record: ShardRecord, sha256: str) -> None:
        """Raise TargetError where a shard is there with another checksum."""
        if record.sha256 != sha256:
            raise TargetError(
                f"the shard {record.name} of {self.place} is there with other bytes: its SHA-256 is {sha256}, that of "
                f"the shard just made {record.sha256}; make all shards with one kind of device and one version of the "
                "packages, or remove the shard and its record to write it again"
            )

    def _check_content(self) -> None:
        """Set ``complete``; raise `TargetError` if the folder holds something else."""
        while True:
            with contextlib.suppress(FileNotFoundError):
                manifest = read_manifest(self._storage)
                self.check_manifest(manifest)
                sizes = self._storage.sizes()
                if missing := [shard.name for shard in manifest.shards if sizes.get(shard.name) != shard.bytes]:
                    advice = "copy them again, or remove the label set to make it again"
                    is_part = self._storage.size(SOME_SHARDS) is not None
                    raise TargetError(
                        f"{self.place} lacks {counted(len(missing), 'whole shard')}, the first is {missing[0]}; "
                        f"{'pull the rest' if is_part else advice}"
                    )
                self.complete = True
                return
            with contextlib.suppress(FileNotFoundError):
                return self._check_job(*read_job(self._storage))
            # Unless it was just finished by another process.
            if self._storage.size(MANIFEST) is None:
                return _check_foreign(self._storage)

    def check_manifest(self, manifest: Manifest) -> None:
        """Raise TargetError where a complete set has other settings."""
        self._check_job(manifest.spec, [shard.samples for shard in manifest.shards])

    def _check_job(self, theirs: LabelSpec, sizes: list[int]) -> None:
        """Raise TargetError where the job that writes the set has other settings."""
        found = [str(each) for each in differences(self.spec, theirs)]
        if len(sizes) != self.num_shards:
            found.append(f"shards is {self.num_shards} and {len(sizes)}")
        elif sizes != self._sizes:
            found.append("the sizes of the shards differ")
        self._refuse(found)

    def _refuse(self, found: Sequence[str]) -> None:
        if found:
            raise TargetError(
                f"{self.place} holds a label set with other settings (yours and its): {'; '.join(found)}; "
                "choose another folder or the same settings"
            )

    def _clean(self, seconds: float) -> None:
        """Remove the temporary files of killed processes, which have not changed for so long."""
        if self._storage.local is not None:
            for folder in ("", PARTIAL, RECORDS, CLAIMS, *self._records.folders()):
                remove_leftovers(self._storage.path(folder), seconds=seconds)


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


def _shard_sizes(shards: int | Sequence[int], samples: int, parts: int) -> list[int]:
    if isinstance(shards, int):
        if not 1 <= shards <= samples:
            raise InputError(f"the number of shards must lie between 1 and the {samples} samples, got {shards}")
        return [last - first for first, last in (shard_range(index, shards, samples) for index in range(shards))]
    sizes = [int(size) for size in shards]
    if not sizes or min(sizes) < 1 or sum(sizes) != samples * parts:
        raise InputError(f"the sizes of the shards sum to {sum(sizes)}, the label set has {samples} samples")
    return sizes
