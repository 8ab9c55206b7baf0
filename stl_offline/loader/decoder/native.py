"""What compiled loops need from outside: the C functions of FFCV's libraries, and four numbers at a time.

The functions are reached by symbol, not by a captured ctypes object, so numba may keep the compiled code on disk and
a second process starts at once.
"""

import ctypes
import weakref

import llvmlite.binding
import numpy as np
from ffcv.libffcv import lib as _ffcv_library
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# TurboJPEG's constants (turbojpeg.h, 2.0 and later).
TJPF_RGB = 0
TJCS_YCBCR = 1
TJERR_WARNING = 0
TJFLAG_ACCURATEDCT = 4096

# FFCV's own extension is linked against libturbojpeg, so looking a name up in it finds TurboJPEG's functions too.
_SYMBOLS = {
    "stl_offline_tj_header": _ffcv_library.tjDecompressHeader3,
    "stl_offline_tj_decompress": _ffcv_library.tjDecompress2,
    "stl_offline_tj_planes": _ffcv_library.tjDecompressToYUVPlanes,
    "stl_offline_tj_error_code": _ffcv_library.tjGetErrorCode,
}
for _name, _function in _SYMBOLS.items():
    llvmlite.binding.add_symbol(_name, ctypes.cast(_function, ctypes.c_void_p).value)

_int, _long, _ulong = types.int32, types.int64, types.uint64

# tjDecompressHeader3(handle, jpeg, bytes, &width, &height, &subsampling, &colour space) → 0 or −1.
tj_header = types.ExternalFunction("stl_offline_tj_header", _int(_long, _long, _ulong, _long, _long, _long, _long))
# tjDecompress2(handle, jpeg, bytes, target, width, pitch, height, pixel format, flags) → 0 or −1.
tj_decompress = types.ExternalFunction(
    "stl_offline_tj_decompress", _int(_long, _long, _ulong, _long, _int, _int, _int, _int, _int)
)
# tjDecompressToYUVPlanes(handle, jpeg, bytes, planes, width, strides or 0, height, flags) → 0 or −1.
tj_planes = types.ExternalFunction("stl_offline_tj_planes", _int(_long, _long, _ulong, _long, _int, _long, _int, _int))
tj_error_code = types.ExternalFunction("stl_offline_tj_error_code", _int(_long))


_FLOAT, _LANES = ir.FloatType(), ir.VectorType(ir.FloatType(), 4)


@intrinsic(prefer_literal=True)
def blend_pixels(typing_context, source, weights, target, taps, onto):
    """Write the weighted sum of the ``taps`` pixels at ``source``, or add it, to the one at ``target``; all addresses.

    A pixel is three float32; taps, onto (whether to add): constants. As a loop in Python over the colours it would be
    compiled to one number at a time. Here it is four: the fourth, which belongs to the next pixel, is made too, and
    overwritten when that pixel's turn comes.
    """

    def generate(context, builder, signature, arguments):
        def memory(address, offset, kind):
            moved = builder.add(address, ir.Constant(ir.IntType(64), offset))
            return builder.inttoptr(moved, kind.as_pointer())

        result = memory(arguments[2], 0, _LANES)
        total = builder.load(result, align=4) if onto.literal_value else None
        # All weights by one load: loads are what this waits for.
        kind = ir.VectorType(_FLOAT, taps.literal_value)
        all_weights = builder.load(memory(arguments[1], 0, kind), align=4)
        for tap in range(taps.literal_value):
            pixel = builder.load(memory(arguments[0], 12 * tap, _LANES), align=4)
            places = ir.Constant(ir.VectorType(ir.IntType(32), 4), [tap] * 4)
            product = builder.fmul(pixel, builder.shuffle_vector(all_weights, ir.Constant(kind, ir.Undefined), places))
            total = product if total is None else builder.fadd(total, product)
        builder.store(total, result, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, taps, onto), generate


class Decompressors:
    """One TurboJPEG instance for each worker, freed with this object. ``handles``: int64 (workers,) addresses."""

    def __init__(self, workers: int) -> None:
        create = _ffcv_library.tjInitDecompress
        create.restype = ctypes.c_void_p
        self.handles = np.array([create() or 0 for _ in range(workers)], dtype=np.int64)
        if not self.handles.all():
            raise MemoryError("TurboJPEG could not make a decoder")
        # Not when the interpreter ends: the loading thread may be decoding.
        weakref.finalize(self, _destroy, self.handles.tolist()).atexit = False


def _destroy(handles: list[int]) -> None:
    for handle in handles:
        _ffcv_library.tjDestroy(ctypes.c_void_p(handle))
