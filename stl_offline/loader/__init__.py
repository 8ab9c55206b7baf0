"""Images and token targets in batches, through FFCV: compiled, reproducible, and guarded against hangs."""

import stl_offline.ffcv_setup  # noqa: F401  # isort: split
from stl_offline.loader.batch import Batch
from stl_offline.loader.decoder import DECODER
from stl_offline.loader.loader import TokenLoader
from stl_offline.loader.order import check_shares

__all__ = ["DECODER", "Batch", "TokenLoader", "check_shares"]
