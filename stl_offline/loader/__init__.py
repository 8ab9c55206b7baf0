"""Pictures and token targets in batches, through FFCV: compiled, reproducible, and guarded against hangs."""

import stl_offline.ffcv_setup  # noqa: F401  # isort: split
from stl_offline.loader.batch import Batch
from stl_offline.loader.decode import DECODER
from stl_offline.loader.loader import TokenLoader

__all__ = ["DECODER", "Batch", "TokenLoader"]
