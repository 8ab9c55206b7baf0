"""Images and token targets in batches, through FFCV: compiled, reproducible, and guarded against hangs."""

import stl_offline.ffcv_setup  # noqa: F401  # isort: split
from stl_offline.loader.batch import Batch, ToDevice
from stl_offline.loader.decoder import DECODER
from stl_offline.loader.loader import ImageSettings, TokenLoader
from stl_offline.loader.order import check_shares, count_batches, rank_batches, shuffled
from stl_offline.loader.stream import StreamLoader
from stl_offline.targets import TokenLabels

__all__ = [
    "DECODER",
    "Batch",
    "ImageSettings",
    "StreamLoader",
    "ToDevice",
    "TokenLabels",
    "TokenLoader",
    "check_shares",
    "count_batches",
    "rank_batches",
    "shuffled",
]
