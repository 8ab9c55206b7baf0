"""Chunks read directly: what zarr itself reads, or an error."""

import numpy as np
import pytest
import zarr
from zarr.buffer import cpu
from zarr.storage import MemoryStore

from stl_offline.errors import FormatError
from stl_offline.labels.format import zarr_shard
from tests.labels.synthetic import make_arrays, make_spec


@pytest.mark.parametrize("encoding", ["f16", "q8"])
@pytest.mark.parametrize(("samples", "grid", "chunk"), [(11, (3, 5), 300), (7, (2, 2), 1 << 20), (1, (14, 14), 1000)])
def test_chunks_read_directly_are_what_zarr_reads(samples, grid, chunk, encoding, monkeypatch):
    """Several chunks with a last one that is not full, and one that is larger than the array."""
    monkeypatch.setattr(zarr_shard, "_CHUNK_BYTES", chunk)
    spec = make_spec(samples=samples, grid=grid, encoding=encoding)
    data = zarr_shard.encode(make_arrays(spec), spec)
    stored = zarr_shard.read_stored(data, spec)
    entries, _ = zarr_shard._unzip(data, None)
    store = MemoryStore({name: cpu.Buffer.from_bytes(content) for name, content in entries.items()}, read_only=True)
    group = zarr.open_group(store=store, mode="r", zarr_format=3)
    assert set(stored) == set(group.array_keys())
    for name, values in stored.items():
        assert values.dtype == group[name].dtype
        np.testing.assert_array_equal(values, group[name][...])


def test_a_chunk_of_another_size_is_refused():
    spec = make_spec(samples=9)
    data = zarr_shard.encode(make_arrays(spec), spec)
    other = make_spec(samples=8)
    smaller = zarr_shard._unzip(zarr_shard.encode(make_arrays(other), other), None)[0]
    entries = zarr_shard._unzip(data, None)[0]
    for name in ("class_id/c/0", "keys/c/0"):
        changed = zarr_shard._zip(entries | {name: smaller[name]})
        with pytest.raises(FormatError, match=f"chunk 0 of the array {name.partition('/')[0]}"):
            zarr_shard.read_stored(changed, spec)
