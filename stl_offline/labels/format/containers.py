"""One content, several containers: a shard's bytes and back, by the container that the spec names."""

from pathlib import Path
from types import ModuleType

from stl_offline.labels.arrays import ShardArrays, ShardIndex
from stl_offline.labels.format import tar_shard, zarr_shard
from stl_offline.labels.spec import LabelSpec

_MODULES: dict[str, ModuleType] = {"zarr": zarr_shard, "webdataset": tar_shard}


def encode_shard(arrays: ShardArrays, spec: LabelSpec) -> bytes:
    """The bytes of a shard's file; the same content gives the same bytes. Raises FormatError."""
    return _MODULES[spec.container].encode(arrays, spec)


def decode_shard(source: bytes | str | Path, spec: LabelSpec) -> ShardArrays:
    """A shard's content from its file or its bytes, every value checked. Raises FormatError."""
    return _MODULES[spec.container].decode(source, spec)


def read_shard_index(source: bytes | str | Path, spec: LabelSpec) -> ShardIndex:
    """Whose labels a shard holds, without the labels where that is possible. Raises FormatError."""
    return _MODULES[spec.container].read_index(source, spec)
