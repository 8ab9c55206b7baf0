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
    parse_ranges,
    present_bytes,
    read_job,
    read_manifest,
    read_object,
    read_present,
    record_name,
)
from stl_offline.labels.store.storage import TRANSFERS, FolderStorage, Storage, each_shard, open_storage

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
    "Storage",
    "each_shard",
    "format_ranges",
    "open_storage",
    "parse_ranges",
    "present_bytes",
    "read_job",
    "read_manifest",
    "read_object",
    "read_present",
    "record_name",
]
