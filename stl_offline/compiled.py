"""`njit`: numba's decorator with this package's options, and a cache of compiled code that works everywhere.

numba by itself keeps compiled code beside the source or in the user's cache folder, raises on import where it can write
to neither, and does not notice a change in a function of another file that a compiled one calls. Here compiled code is
kept in the folder ``compiled`` of `stl_offline.files.cache_dir` (or in ``NUMBA_CACHE_DIR``), is valid for exactly the
sources that it was made from, and is not kept at all where the folder cannot be written. Each state of the sources,
release of numba and kind of processor has a folder of its own: numba's index and data files are replaced one after the
other and without a lock, so those of one never stand for another's.
"""

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from stl_offline.files import cache_dir

logger = logging.getLogger(__name__)

_SOURCES = Path(__file__).resolve().parent
_FOLDERS_KEPT = 5


def njit(function: Callable | None = None, *, inner: bool = False, inline: bool = False) -> Callable:
    """`numba.njit` without the GIL, with compiled code kept on disk.

    Args:
        function: what is decorated, where there are no options.
        inner: only compiled code calls it. No wrapper for Python is made, which is a third of the compilation of a
            small function; tests call it from a compiled function of their own.
        inline: it becomes a part of its caller, and is not compiled twice. For a few lines only: numba copies a
            function block by block, each with all its variables, so for long ones this takes longer than it saves.
    """
    if function is None:
        return functools.partial(njit, inner=inner, inline=inline)
    how = "always" if inline else "never"
    dispatcher = numba.njit(nogil=True, no_cfunc_wrapper=True, no_cpython_wrapper=inner, inline=how)(function)
    if not numba.config.DISABLE_JIT:
        dispatcher._cache = _Cache(function)
    return dispatcher


def read_only(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """The array as compiled code takes what it only reads: contiguous, not writable, no subclass such as np.memmap.

    numba compiles anew for each combination of these, so all callers of a function give the same.
    """
    array = np.ascontiguousarray(array, dtype).view()
    array.flags.writeable = False
    return array


class _Locator(_CacheLocator):
    """Tells numba where the compiled code of a function lies, and what it is valid for."""

    def __init__(self, function: Callable, path: str) -> None:
        self._py_file = path
        self._line = function.__code__.co_firstlineno

    @classmethod
    def from_function(cls, function: Callable, path: str) -> "_Locator":
        return cls(function, path)

    def get_cache_path(self) -> str:
        return os.path.join(_folder(), self.get_suitable_cache_subpath(self._py_file))

    def get_source_stamp(self) -> str:
        return _digest()

    def get_disambiguator(self) -> str:
        return str(self._line)


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _FunctionCache(FunctionCache):
    _impl_class = _CacheImpl


class _Cache:
    """The cache of one function, looked for at its first call: importing touches no folder."""

    cache_path = None

    def __init__(self, function: Callable) -> None:
        self._function = function

    @functools.cached_property
    def _files(self) -> FunctionCache | None:
        return _FunctionCache(self._function) if _folder() else None

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        found = None
        try:
            # Without a cache, what a load does beside: numba's tables have to be there before anything is compiled.
            found = self._files.load_overload(signature, target_context) if self._files else target_context.refresh()
        except Exception as error:  # of whatever kind: it can be made again
            logger.debug("compiled code of %s cannot be read, compiling it: %s", self._function.__name__, error)
        if found is None:
            _announce()
        return found

    def save_overload(self, signature: Any, data: Any) -> None:
        if self._files:
            try:
                self._files.save_overload(signature, data)
            except Exception as error:  # it reads what is there, as above
                logger.debug("compiled code of %s cannot be kept: %s", self._function.__name__, error)

    def flush(self) -> None:
        if self._files:
            self._files.flush()


@functools.cache
def _folder() -> str | None:
    """Where compiled code is kept, or None where no folder can be written."""
    try:
        root = Path(numba.config.CACHE_DIR) / "stl-offline" if numba.config.CACHE_DIR else cache_dir() / "compiled"
        processor = cpu_target.target_context.codegen().magic_tuple()
        valid_for = repr((_digest(), numba.__version__, processor))
        folder = root / hashlib.sha256(valid_for.encode()).hexdigest()[:16]
        if not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another process removes the same ones
                _remove_old(root)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        logger.warning(
            "compiled code cannot be kept (%s), so every process compiles again; set %s to a folder that can be "
            "written",
            error,
            "NUMBA_CACHE_DIR" if numba.config.CACHE_DIR else "STL_OFFLINE_CACHE",
        )
    return None


def _remove_old(root: Path) -> None:
    """Keep the newest folders alone: each change of the sources makes one."""
    folders = [path for path in root.glob(16 * "[0-9a-f]") if path.is_dir() and not path.is_symlink()]
    for path in sorted(folders, key=lambda path: path.stat().st_mtime)[:-_FOLDERS_KEPT]:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _digest() -> str:
    """SHA-256 of the package's sources: a compiled function holds those that it calls, and constants of other files."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.rglob("*.py")):
        digest.update(f"{path.relative_to(_SOURCES)}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@functools.cache
def _announce() -> None:
    logger.info("compiling for this machine: about 10 seconds in all, once")


@intrinsic
def _atomic_add(typing_context, address, amount):
    def generate(context, builder, signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return numba.types.int64(numba.types.int64, numba.types.int64), generate


@njit(inline=True)
def next_item(counter):
    """Take the next number from ``counter``, int64 (1,), shared by threads: each item goes to whoever is free."""
    return _atomic_add(np.int64(counter.ctypes.data), np.int64(1))
