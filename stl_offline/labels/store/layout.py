"""File names of a label set, and reading its small files.

`manifest.json` is written last and makes it a label set; until then `.partial/` holds the settings of the job that
writes it (`job.json`), a record for each finished shard, and a claim for each that a worker is writing. `partial.json`
beside the manifest lists the shards of a set that was pulled in part.
"""

import re
from collections.abc import Iterable
from typing import Any

from stl_offline.errors import FormatError, InputError
from stl_offline.files import canonical_json
from stl_offline.labels.manifest import Manifest, parse_object
from stl_offline.labels.spec import LabelSpec, is_count
from stl_offline.labels.store.storage import Storage
from stl_offline.remote import is_refusal

MANIFEST = "manifest.json"
CARD = "README.md"
SOME_SHARDS = "partial.json"
PARTIAL = ".partial"
JOB = f"{PARTIAL}/job.json"
PULL = f"{PARTIAL}/pull.json"
RECORDS = f"{PARTIAL}/records"
CLAIMS = f"{PARTIAL}/claims"

# Larger files than these belong to no label set, and would only cost memory: some 300,000 shards in a manifest, or a
# million numbers in `partial.json`.
_MANIFEST_BYTES = 1 << 26
_SOME_SHARDS_BYTES = 1 << 24
RECORD_BYTES = 1 << 12


def read_manifest(storage: Storage) -> Manifest:
    """The manifest; FileNotFoundError where there is none, FormatError that names the file where it cannot be used."""
    data = _read_small(storage, MANIFEST, _MANIFEST_BYTES)
    try:
        return Manifest.from_bytes(data)
    except FormatError as error:
        raise FormatError(f"{storage.place}/{MANIFEST}: {error}") from error


def read_object(storage: Storage, name: str, most: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``most`` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        FormatError: the file is larger, or holds something else.
    """
    data = _read_small(storage, name, most)
    try:
        return parse_object(data)
    except FormatError as error:
        raise FormatError(f"{storage.place}/{name}: {error}") from error


def _read_small(storage: Storage, name: str, most: int) -> bytes:
    size = storage.size(name) or 0
    if size > most:
        raise FormatError(f"{storage.place}/{name} has {size:,} bytes; that of a label set has at most {most:,}")
    return storage.read(name)


def read_job(storage: Storage) -> tuple[LabelSpec, list[int]]:
    """Settings and shard sizes of a job that has not ended; errors as `read_manifest`."""
    data = _read_small(storage, JOB, _MANIFEST_BYTES)
    try:
        settings = parse_object(data)
        spec = LabelSpec.from_json(settings)
        sizes = settings["shard_samples"]
        samples = spec.num_samples * len(spec.parts)
        if not isinstance(sizes, list) or not all(is_count(size) for size in sizes) or sum(sizes) != samples:
            raise FormatError("its shard sizes are not positive numbers that sum to the set's images")
        return spec, sizes
    except (ValueError, KeyError) as error:
        raise FormatError(f"{storage.place}/{JOB}: {error}; remove the folder and start again") from error


def job_settings(storage: Storage) -> dict[str, Any] | None:
    """What a job that has not ended wrote when it began: {} where it cannot be read, None where there is no job."""
    try:
        return read_object(storage, JOB, _MANIFEST_BYTES)
    except FileNotFoundError:
        return None
    except FormatError:
        return {}


def read_present(storage: Storage, num_shards: int) -> tuple[int, ...]:
    """Which shards are there: all of them, or those that `partial.json` lists. Raises FormatError."""
    try:
        data = _read_small(storage, SOME_SHARDS, _SOME_SHARDS_BYTES)
    except FileNotFoundError:
        return tuple(range(num_shards))
    except InputError as error:
        # S3's answer about what is not there to those who may read, but not list; also that of its web address.
        if not is_refusal(error.__cause__):
            raise
        return tuple(range(num_shards))
    try:
        shards = parse_object(data)["shards"]
        if not isinstance(shards, list) or not all(type(shard) is int and 0 <= shard < num_shards for shard in shards):
            raise FormatError(f"its shards are no numbers below {num_shards}")
        if not shards:
            raise FormatError("it lists no shards")
    except (ValueError, KeyError) as error:
        raise FormatError(f"{storage.place}/{SOME_SHARDS} cannot be used: {error}; pull the shards again") from error
    return tuple(sorted(set(shards)))


def present_bytes(shards: Iterable[int]) -> bytes:
    """The bytes of `partial.json`."""
    return canonical_json({"shards": sorted(shards)})


def parse_ranges(text: str, known: range, what: str = "shards") -> tuple[int, ...]:
    """Numbers of shards (or views) from a text such as ``0-3,7``, sorted.

    Raises:
        InputError: another text, or a number that the set does not have.
    """
    shards: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        if not match:
            raise InputError(f"{text!r} names no {what}; write them as 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or first not in known or last not in known:
            raise InputError(f"there are no {what} {part.strip()}: the label set has {known[0]} to {known[-1]}")
        shards.update(range(first, last + 1))
    return tuple(sorted(shards))


def format_ranges(shards: Iterable[int]) -> str:
    """The inverse of `parse_ranges`: ``0-3,7``."""
    runs: list[list[int]] = []
    for shard in sorted(shards):
        if runs and shard == runs[-1][1] + 1:
            runs[-1][1] = shard
        else:
            runs.append([shard, shard])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
