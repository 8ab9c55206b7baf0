"""Imports FFCV without what importing it does to a process. To be imported before anything of FFCV.

Plain ``import ffcv`` sets torch to one thread for the whole process, and compiles a typed dictionary for a table of
two entries, five to ten seconds in every process; an ordinary dictionary serves it as well.
"""

import importlib

import numba.typed
import torch

_threads = torch.get_num_threads()
_typed_dictionary = numba.typed.Dict
numba.typed.Dict = dict
try:
    importlib.import_module("ffcv.loader")
finally:
    numba.typed.Dict = _typed_dictionary
    torch.set_num_threads(_threads)
