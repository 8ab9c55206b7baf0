"""One compiled function run by several threads, compiled once.

For every parallel loop numba compiles all that the loop calls anew, and optimises it several times over, which took
longer than compiling the work itself. So the loop here knows its work by address only. What is worked on is one record,
in which arrays stand by their addresses, so that no function takes twenty of them; whoever fills it keeps the arrays
alive.
"""

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

# What a function must be declared as: void(worker, address of the record).
WORK_SIGNATURE = types.void(types.int64, types.voidptr)


def run_work(work: CFunc, record: np.ndarray, workers: int) -> None:
    """Call ``work(worker, record)`` for each of ``workers`` numbers, side by side.

    The work must not raise: nothing outside would see it.
    """
    if workers == 1:
        work.ctypes(0, record.ctypes.data)
    else:
        _run_parallel(work.address, record.ctypes.data, workers)


@intrinsic
def pointer(typing_context, address):
    """An address, int64, as what `numba.carray` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.voidptr(types.int64), generate


@intrinsic
def _call(typing_context, work, worker, record):
    def generate(context, builder, signature, arguments):
        number = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), [number, number])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), arguments[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(cache=True, nogil=True, parallel=True)
def _run_parallel(work, record, workers):
    for worker in prange(workers):
        _call(work, np.int64(worker), record)
