"""Lets the package be imported where FFCV is not installed: names of FFCV stand for nothing, and no image is decoded.

FFCV is compiled against OpenCV and turbojpeg, which a GPU machine without a package index lacks. What needs no packed
images, which is all that is measured here, then runs with images from memory.
"""

import ctypes
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType


class _Nothing:
    """What a name of FFCV stands for: a class to derive from, a function to call, a type of records of four fields."""

    names, itemsize = ("", "", "", ""), 1

    def __init__(self, *_: object, **__: object) -> None:
        pass


class _Library:
    """A library whose every function does nothing."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return ctypes.CFUNCTYPE(ctypes.c_int)(lambda: -1)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``ffcv`` and all modules below it; their attributes are classes that do nothing."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] != "ffcv":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        def attribute(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            found = _Library() if name == "lib" else type(name, (_Nothing,), {})
            setattr(module, name, found)
            return found

        module.__getattr__ = attribute


def stand_in_for_ffcv() -> bool:
    """Make ``import ffcv`` work where it is not installed; gives whether it is."""
    if importlib.util.find_spec("ffcv") is not None:
        return True
    sys.meta_path.append(_Finder())
    return False
