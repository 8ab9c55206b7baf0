"""What lies where in a label set, and reading the small files that say what it is.

`manifest.json` is written last and makes it a label set; until then `.partial/` holds the settings of the job that
writes it (`job.json`), its lock, and a record for each finished shard. `partial.json` beside the manifest lists the
shards of a set that was pulled in part.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

from stl_offline.errors import FormatError, InputError
from stl_offline.files import canonical_json
from stl_offline.labels.manifest import Manifest, shard_name
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.store.storage import Storage

MANIFEST = "manifest.json"
CARD = "README.md"
SOME_SHARDS = "partial.json"
PARTIAL = ".partial"
JOB = f"{PARTIAL}/job.json"
PULL = f"{PARTIAL}/pull.json"
LOCK = f"{PARTIAL}/lock"
RECORDS = f"{PARTIAL}/records"

# A million shards' records; more is no manifest, and would only cost memory.
_MOST_BYTES = 1 << 28


def record_name(index: int, num_shards: int, container: str) -> str:
    """Where the record of a finished shard lies while the job runs."""
    return f"{RECORDS}/{shard_name(index, num_shards, container)}.json"


def read_manifest(storage: Storage) -> Manifest:
    """The manifest; FileNotFoundError where there is none, FormatError that names the file where it cannot be used."""
    if (storage.size(MANIFEST) or 0) > _MOST_BYTES:
        raise FormatError(f"{storage.place}/{MANIFEST} is larger than any label set's")
    data = storage.read(MANIFEST)
    try:
        return Manifest.from_bytes(data)
    except FormatError as error:
        raise FormatError(f"{storage.place}/{MANIFEST}: {error}") from error


def read_job(storage: Storage) -> tuple[LabelSpec, list[int]]:
    """Settings and shard sizes of a job that has not ended; errors as `read_manifest`."""
    data = storage.read(JOB)
    try:
        settings: dict[str, Any] = json.loads(data)
        spec = LabelSpec.from_json(settings)
        sizes = settings["shard_samples"]
        if not isinstance(sizes, list) or not all(isinstance(size, int) for size in sizes):
            raise FormatError("its shard sizes are no numbers")
        return spec, sizes
    except (ValueError, KeyError) as error:
        raise FormatError(f"{storage.place}/{JOB}: {error}; remove the folder and start again") from error


def read_present(storage: Storage, num_shards: int) -> tuple[int, ...]:
    """Which shards are there: all of them, or those that `partial.json` lists. Raises FormatError."""
    try:
        data = storage.read(SOME_SHARDS)
    except FileNotFoundError:
        return tuple(range(num_shards))
    try:
        shards = json.loads(data)["shards"]
        if not isinstance(shards, list) or not all(type(shard) is int and 0 <= shard < num_shards for shard in shards):
            raise ValueError(f"its shards are no numbers below {num_shards}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{storage.place}/{SOME_SHARDS} cannot be used: {error}; pull the shards again") from error
    return tuple(sorted(set(shards)))


def present_bytes(shards: Iterable[int]) -> bytes:
    """The bytes of `partial.json`."""
    return canonical_json({"shards": sorted(shards)})


def parse_ranges(text: str, num_shards: int) -> tuple[int, ...]:
    """Shard numbers from a text such as ``0-3,7``, sorted.

    Raises:
        InputError: another text, or a shard that the set does not have.
    """
    shards: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:\s*-\s*(\d{1,9}))?\s*", part, re.ASCII)
        if not match:
            raise InputError(f"{text!r} names no shards; write them as 0-3,7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last >= num_shards:
            raise InputError(f"there are no shards {part.strip()}: the label set has 0 to {num_shards - 1}")
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
