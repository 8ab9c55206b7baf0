"""The bytes of a label shard: containers, arrays and encodings (docs/format.md)."""

from stl_offline.labels.format.containers import decode_shard, encode_shard, read_shard_index
from stl_offline.labels.format.q8 import confidence_table, logit_table
from stl_offline.labels.format.zarr_shard import read_stored

__all__ = ["confidence_table", "decode_shard", "encode_shard", "logit_table", "read_shard_index", "read_stored"]
