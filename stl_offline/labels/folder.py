"""What lies where in a label set, and reading the two files that say what it is.

`manifest.json` is written last and makes it a label set; until then `.partial/` holds the settings of the job that
writes it (`job.json`), its lock, and a record for each finished shard.
"""

import json
from typing import Any

from stl_offline.errors import FormatError
from stl_offline.labels.manifest import Manifest, shard_name
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.storage import Storage

MANIFEST = "manifest.json"
PARTIAL = ".partial"
JOB = f"{PARTIAL}/job.json"
LOCK = f"{PARTIAL}/lock"
RECORDS = f"{PARTIAL}/records"


def record_name(index: int, num_shards: int, container: str) -> str:
    """Where the record of a finished shard lies while the job runs."""
    return f"{RECORDS}/{shard_name(index, num_shards, container)}.json"


def read_manifest(storage: Storage) -> Manifest:
    """The manifest; FileNotFoundError where there is none, FormatError that names the file where it cannot be used."""
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
