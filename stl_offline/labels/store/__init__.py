"""Where the files of a label set lie, what they are called, and which worker writes which of them."""

from stl_offline.labels.store.claims import Claims
from stl_offline.labels.store.layout import (
    CARD,
    CLAIMS,
    JOB,
    MANIFEST,
    PARTIAL,
    PULL,
    RECORD_BYTES,
    RECORDS,
    SOME_SHARDS,
    format_ranges,
    job_settings,
    parse_ranges,
    present_bytes,
    read_job,
    read_manifest,
    read_object,
    read_present,
)
from stl_offline.labels.store.records import Records
from stl_offline.labels.store.storage import (
    TRANSFERS,
    FolderStorage,
    ObjectStorage,
    Storage,
    each_shard,
    open_storage,
)

__all__ = [
    "CARD",
    "CLAIMS",
    "JOB",
    "MANIFEST",
    "PARTIAL",
    "PULL",
    "RECORDS",
    "RECORD_BYTES",
    "SOME_SHARDS",
    "TRANSFERS",
    "Claims",
    "FolderStorage",
    "ObjectStorage",
    "Records",
    "Storage",
    "each_shard",
    "format_ranges",
    "job_settings",
    "open_storage",
    "parse_ranges",
    "present_bytes",
    "read_job",
    "read_manifest",
    "read_object",
    "read_present",
]
