"""FFCV leaves the process as it was."""

import importlib

import numba
import torch
from numba import types

import stl_offline.ffcv_setup  # noqa: F401


def test_numbas_shared_types_stay_as_they_are():
    writable = types.Array(types.uint8, 1, "C")
    manager = importlib.import_module("ffcv.memory_managers.os_cache").OSCacheManager
    storage, *places = manager.state_type.fget(None)
    assert writable.mutable
    assert not storage.mutable
    assert all(place.mutable for place in places)
    assert types.Array(types.uint8, 1, "C") is writable


def test_threads_and_numbas_dictionary_are_left_alone():
    assert numba.typed.Dict is not dict
    before = torch.get_num_threads()
    importlib.import_module("ffcv.loader")
    assert torch.get_num_threads() == before
