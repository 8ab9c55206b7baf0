"""Imports FFCV without what importing and using it does to a process. To be imported before anything of FFCV.

- Plain ``import ffcv`` sets torch to one thread for the whole process, and compiles a typed dictionary for a table of
  two entries, five to ten seconds in every process; an ordinary dictionary serves it as well.
- Making a loader turns numba's type of contiguous bytes read-only in place. numba shares one object for each type, so
  code compiled before for writable bytes is no longer found under its own key, and a later compilation ends in a
  KeyError: now and then, since it takes code that is not on disk yet, and a second loader.
- Its import starts a thread, which gets a heap of its own from glibc, as all later ones do. Such heaps consist of
  pieces of 64 MB that return to the system when they are empty, whatever `stl_offline.device.keep_freed_memory` asks
  for. So all threads share the process's heap.
"""

import contextlib
import ctypes
import importlib
from collections.abc import Callable

import numba.typed
import numpy as np
import torch
from numba import types

_M_ARENA_MAX = -8  # mallopt's name for it (malloc.h)
with contextlib.suppress(OSError, AttributeError):
    ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)
_threads = torch.get_num_threads()
_typed_dictionary = numba.typed.Dict
numba.typed.Dict = dict
try:
    importlib.import_module("ffcv.loader")
finally:
    numba.typed.Dict = _typed_dictionary
    torch.set_num_threads(_threads)


_FILE_BYTES = types.Array(types.uint8, 1, "C", readonly=True)
_PLACES = types.Array(types.uint64, 1, "C")
_os_cache = importlib.import_module("ffcv.memory_managers.os_cache")


def _state_type(_manager: object) -> types.Type:
    """(the file's bytes, pages' places, pages' sizes), with a type of its own for bytes that are only read."""
    return types.Tuple([_FILE_BYTES, _PLACES, _PLACES])


def _compile_reader(manager: object) -> Callable:
    """FFCV's reader of a sample's bytes, which it declares with the type that it has turned read-only."""

    def read(address, state):
        size = state[2][np.searchsorted(state[1], address)]
        return state[0][address : address + size]

    return _os_cache.Compiler.compile(read, _FILE_BYTES(types.uint64, _state_type(manager)))


_os_cache.OSCacheManager.state_type = property(_state_type)
_os_cache.OSCacheManager.compile_reader = _compile_reader
