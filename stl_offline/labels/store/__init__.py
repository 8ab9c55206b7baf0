"""Where the files of a label set lie, what they are called, and who may write there."""

from stl_offline.labels.store.layout import (
    CARD,
    JOB,
    LOCK,
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
from stl_offline.labels.store.lease import Lease
from stl_offline.labels.store.lock import JobLock, try_lock
from stl_offline.labels.store.storage import FolderStorage, Storage, each_shard, open_storage

__all__ = [
    "CARD",
    "JOB",
    "LOCK",
    "MANIFEST",
    "PARTIAL",
    "PULL",
    "RECORDS",
    "RECORD_BYTES",
    "SOME_SHARDS",
    "FolderStorage",
    "JobLock",
    "Lease",
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
    "try_lock",
]
