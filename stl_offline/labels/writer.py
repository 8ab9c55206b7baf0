"""Writes a label set, shard by shard, so that a kill at any instant loses no whole shard and leaves no half one.

While a job runs, the folder holds finished shards and `.partial/`: the settings (`job.json`), the lock, and one record
for each finished shard. A shard is written to a temporary name, renamed, and exists once its record does. At the end
`manifest.json` is put together from the records, and `.partial/` goes. Nothing that is written depends on the clock,
the folder's name or the number of processes: the same input gives the same bytes.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from stl_offline.errors import FormatError, InputError, StlError, TargetError
from stl_offline.files import atomic_write, canonical_json, make_folder, sha256_bytes
from stl_offline.labels import containers
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.job import JobLock, try_lock
from stl_offline.labels.spec import LabelSpec, Manifest, ShardRecord, differences, shard_name, shard_range

MANIFEST = "manifest.json"
PARTIAL = ".partial"


class LabelSetWriter:
    """Writes the label set ``path``: goes on where a killed job stopped, and does nothing where all is done.

    Use it as a context manager; each process of a job has one of its own. Every shard must be written by one process:
    share them out by index, or `claim` them.

    Args:
        path: the folder, made where it is missing.
        spec: the settings; those of a job that is resumed must be the same.
        num_shards: how many shards.
        job: an id that the processes of one job share (`stl_offline.labels.job.job_from_environment`); None: this
            process is the whole job.

    ``complete`` tells whether the label set was whole already.

    Raises:
        InputError: more shards than samples.
        TargetError: the folder holds something else or a label set with other settings (named), another job is
            writing there, or it cannot be written.
    """

    def __init__(self, path: str | Path, spec: LabelSpec, num_shards: int, *, job: str | None = None) -> None:
        if not 1 <= num_shards <= spec.num_samples:
            raise InputError(
                f"the number of shards must lie between 1 and the {spec.num_samples} samples, got {num_shards}"
            )
        self.path = Path(path)
        self.spec = spec
        self.num_shards = num_shards
        self.complete = False
        self._job = job
        self._lock: JobLock | None = None
        self._claims: list[int] = []

    def __enter__(self) -> Self:
        make_folder(self.path)
        self._check_content()
        if not self.complete:
            self._lock = JobLock(self._partial / "lock", self._job, self._clean)
            try:
                # Again, now that nobody else changes it.
                self._check_content()
                if not self.complete and not (self._partial / "job.json").exists():
                    atomic_write(self._partial / "job.json", self._settings())
                make_folder(self._partial / "records")
            except BaseException:
                self._release()
                raise
        if self.complete:
            self._remove_partial()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def shard_range(self, index: int) -> tuple[int, int]:
        """The half-open range of samples of shard ``index``."""
        return shard_range(index, self.num_shards, self.spec.num_samples)

    def shard_path(self, index: int) -> Path:
        """The file of shard ``index``."""
        return self.path / shard_name(index, self.num_shards, self.spec.container)

    def is_done(self, index: int) -> bool:
        """Whether shard ``index`` is written, recorded, and as large as its record says."""
        return self.complete or self._record(index) is not None

    def missing(self) -> list[int]:
        """The shards that are not done by now, whoever writes them; once it is empty, `finish` can be called."""
        missing = [index for index in range(self.num_shards) if not self.is_done(index)]
        if missing and (self.path / MANIFEST).exists():
            # Another process of this job has finished the label set meanwhile, and taken the records away.
            self._check_content()
            return []
        return missing

    def todo(self, rank: int = 0, processes: int = 1) -> list[int]:
        """The shards that are not done and belong to process ``rank``: every ``processes``-th by index."""
        return [index for index in range(rank, self.num_shards, processes) if not self.is_done(index)]

    def claim(self, index: int) -> bool:
        """Whether shard ``index`` is now this process's to write: it is not done, and no other process has it.

        A claim ends with the writer or the process. For jobs whose processes share the shards out as they go.
        """
        claims = make_folder(self._partial / "claims")
        held = try_lock(claims / f"{index:05d}")
        if held is None:
            return False
        if self.is_done(index):
            os.close(held)
            return False
        self._claims.append(held)
        return True

    def write_shard(self, index: int, arrays: ShardArrays) -> ShardRecord:
        """Encode and store shard ``index``: temporary file, rename, then the record that makes it exist.

        Raises:
            FormatError: the arrays do not fit the spec or the shard's range.
            TargetError: the disk is full or cannot be written; shards that are done stay.
        """
        first, last = self.shard_range(index)
        if len(arrays) != last - first:
            raise FormatError(f"shard {index} holds samples {first} to {last}, got {len(arrays)} samples")
        return self.write_encoded(index, containers.encode(arrays, self.spec))

    def write_encoded(self, index: int, data: bytes) -> ShardRecord:
        """`write_shard` for bytes that `stl_offline.labels.containers.encode` gave (perhaps in another thread)."""
        if self._lock is None:
            raise TargetError(f"the label set {self.path} is not open for writing: it is complete or closed")
        first, last = self.shard_range(index)
        path = self.shard_path(index)
        record = ShardRecord(path.name, first, last - first, len(data), sha256_bytes(data))
        # A shard that is written anew must not keep an older record while its file is replaced.
        with contextlib.suppress(FileNotFoundError):
            self._record_path(index).unlink()
        atomic_write(path, data)
        atomic_write(self._record_path(index), canonical_json(record.to_json()))
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
                    f"{len(missing)} of {self.num_shards} shards of {self.path} are not written yet, the first is "
                    f"{missing[0]}; run the same command again to go on"
                )
            return read_manifest(self.path)
        if self._lock is None:
            raise TargetError(f"the label set {self.path} is not open for writing")
        manifest = Manifest(self.spec, tuple(records))
        atomic_write(self.path / MANIFEST, manifest.to_bytes())
        self.complete = True
        self._remove_partial()
        return manifest

    @property
    def _partial(self) -> Path:
        return self.path / PARTIAL

    def _settings(self) -> bytes:
        return canonical_json({**self.spec.to_json(), "num_shards": self.num_shards})

    def _record_path(self, index: int) -> Path:
        return self._partial / "records" / f"{shard_name(index, self.num_shards, self.spec.container)}.json"

    def _record(self, index: int) -> ShardRecord | None:
        """The record of a finished shard, or None."""
        try:
            record = ShardRecord.from_json(json.loads(self._record_path(index).read_bytes()))
            first, last = self.shard_range(index)
            whole = (
                record.name == self.shard_path(index).name
                and (record.first, record.samples) == (first, last - first)
                and self.shard_path(index).stat().st_size == record.bytes
            )
        except (OSError, ValueError, StlError):
            # No record, or one that tells nothing: the shard is written (again).
            return None
        return record if whole else None

    def _check_content(self) -> None:
        """Set ``complete``, or refuse a folder that holds something else."""
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            self._check_settings(manifest.spec, len(manifest.shards))
            missing = [
                shard.name
                for shard in manifest.shards
                if not (self.path / shard.name).exists() or (self.path / shard.name).stat().st_size != shard.bytes
            ]
            if missing:
                raise TargetError(
                    f"the label set {self.path} is damaged: {len(missing)} of its shards are missing or cut off, the "
                    f"first is {missing[0]}; remove its {MANIFEST} to write them again"
                )
            self.complete = True
        elif (self._partial / "job.json").exists():
            settings = read_job(self.path)
            self._check_settings(LabelSpec.from_json(settings), settings.get("num_shards"))
        else:
            others = sorted(entry.name for entry in self.path.iterdir() if entry.name != PARTIAL)
            if others:
                raise TargetError(
                    f"the folder {self.path} is not empty and holds no label set ({others[0]} lies there); "
                    "choose another folder"
                )

    def _check_settings(self, theirs: LabelSpec, num_shards: int | None) -> None:
        found = differences(self.spec, theirs)
        if num_shards != self.num_shards:
            found.append(f"shards is {self.num_shards} and {num_shards}")
        if found:
            raise TargetError(
                f"{self.path} holds a label set with other settings (yours and its): {'; '.join(found)}; "
                "choose another folder or the same settings"
            )

    def _clean(self) -> None:
        """Remove the temporary files of a killed job."""
        for folder in (self.path, self._partial, self._partial / "records"):
            if folder.is_dir():
                for entry in folder.glob(".*.tmp"):
                    entry.unlink(missing_ok=True)

    def _remove_partial(self) -> None:
        # A sibling process may be removing it, too.
        shutil.rmtree(self._partial, ignore_errors=True)

    def _release(self) -> None:
        for held in self._claims:
            os.close(held)
        self._claims.clear()
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def read_manifest(path: Path) -> Manifest:
    """The manifest of the label set in a folder; raises FormatError that names the file."""
    try:
        return Manifest.from_bytes((path / MANIFEST).read_bytes())
    except FormatError as error:
        raise FormatError(f"{path / MANIFEST}: {error}") from error


def read_job(path: Path) -> dict:
    """The settings of a job that has not ended; raises FormatError that names the file."""
    job = path / PARTIAL / "job.json"
    try:
        settings = json.loads(job.read_bytes())
        LabelSpec.from_json(settings)
        return settings
    except (ValueError, FormatError) as error:
        raise FormatError(f"{job}: {error}") from error
