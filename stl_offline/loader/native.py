"""What compiled loops need from outside: an atomic counter, and the C functions of FFCV's libraries.

The functions are reached by symbol, not by a captured ctypes object, so numba may keep the compiled code on disk and
a second process starts at once.
"""

import ctypes
import weakref

import llvmlite.binding
import numpy as np
from ffcv.libffcv import lib as _ffcv_library
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# TurboJPEG's constants (turbojpeg.h, 2.0 and later).
TJPF_RGB = 0
TJCS_YCBCR = 1
TJERR_WARNING = 0
TJFLAG_ACCURATEDCT = 4096

# FFCV's own extension is linked against libturbojpeg, so looking a name up in it finds TurboJPEG's functions too.
_SYMBOLS = {
    "stl_offline_resize": _ffcv_library.resize,
    "stl_offline_tj_header": _ffcv_library.tjDecompressHeader3,
    "stl_offline_tj_decompress": _ffcv_library.tjDecompress2,
    "stl_offline_tj_planes": _ffcv_library.tjDecompressToYUVPlanes,
    "stl_offline_tj_error_code": _ffcv_library.tjGetErrorCode,
}
for _name, _function in _SYMBOLS.items():
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_int, _long, _ulong = types.int32, types.int64, types.uint64

# resize(unused, source, rows, columns, first row, end row, first column, end column, target, rows, columns): area.
resize_area = types.ExternalFunction("stl_offline_resize", types.void(*[_long] * 11))
# tjDecompressHeader3(handle, jpeg, bytes, &width, &height, &subsampling, &colour space) → 0 or −1.
tj_header = types.ExternalFunction("stl_offline_tj_header", _int(_long, _long, _ulong, _long, _long, _long, _long))
# tjDecompress2(handle, jpeg, bytes, target, width, pitch, height, pixel format, flags) → 0 or −1.
tj_decompress = types.ExternalFunction(
    "stl_offline_tj_decompress", _int(_long, _long, _ulong, _long, _int, _int, _int, _int, _int)
)
# tjDecompressToYUVPlanes(handle, jpeg, bytes, planes, width, strides or 0, height, flags) → 0 or −1.
tj_planes = types.ExternalFunction("stl_offline_tj_planes", _int(_long, _long, _ulong, _long, _int, _long, _int, _int))
tj_error_code = types.ExternalFunction("stl_offline_tj_error_code", _int(_long))


@intrinsic
def _atomic_add(typing_context, address, amount):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@njit(cache=True, nogil=True)
def next_item(counter):
    """Take the next number from ``counter``, int64 (1,), shared by threads: each item goes to whoever is free."""
    return _atomic_add(np.int64(counter.ctypes.data), np.int64(1))


class Decompressors:
    """One TurboJPEG instance for each worker, freed with this object. ``handles``: int64 (workers,) addresses."""

    def __init__(self, workers: int) -> None:
        create = _ffcv_library.tjInitDecompress
        create.restype = ctypes.c_void_p
        self.handles = np.array([create() or 0 for _ in range(workers)], dtype=np.int64)
        if not self.handles.all():
            raise MemoryError("TurboJPEG could not make a decoder")
        weakref.finalize(self, _destroy, self.handles.tolist())


def _destroy(handles: list[int]) -> None:
    for handle in handles:
        _ffcv_library.tjDestroy(ctypes.c_void_p(handle))
