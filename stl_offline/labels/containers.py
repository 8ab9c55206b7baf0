"""One content, several containers: a shard's bytes and back, by the container that the spec names."""

from pathlib import Path
from types import ModuleType

import numpy as np

from stl_offline.labels import tar_shard, zarr_shard
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec

_MODULES: dict[str, ModuleType] = {"zarr": zarr_shard, "webdataset": tar_shard}


def encode(arrays: ShardArrays, spec: LabelSpec) -> bytes:
    """The bytes of a shard's file; the same content gives the same bytes. Raises FormatError."""
    return _MODULES[spec.container].encode(arrays, spec)


def decode(source: bytes | str | Path, spec: LabelSpec) -> ShardArrays:
    """A shard's content from its file or its bytes, every value checked. Raises FormatError."""
    return _MODULES[spec.container].decode(source, spec)


def read_index(source: bytes | str | Path, spec: LabelSpec) -> tuple[list[str], np.ndarray]:
    """Keys and content hashes (uint64) of a shard, without its labels where that is possible. Raises FormatError."""
    return _MODULES[spec.container].read_index(source, spec)
