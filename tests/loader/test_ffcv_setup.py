"""FFCV leaves the process as it was."""

import stl_offline.ffcv_setup  # noqa: F401  # isort: split
import numba
import torch
from ffcv.memory_managers.os_cache import OSCacheManager
from numba import types


def test_numbas_shared_types_stay_as_they_are():
    writable = types.Array(types.uint8, 1, "C")
    storage, *places = OSCacheManager.state_type.fget(None)
    assert writable.mutable
    assert not storage.mutable
    assert all(place.mutable for place in places)
    assert types.Array(types.uint8, 1, "C") is writable


def test_threads_and_numbas_dictionary_are_left_alone():
    assert numba.typed.Dict is not dict
    before = torch.get_num_threads()
    import ffcv.loader  # noqa: F401

    assert torch.get_num_threads() == before
