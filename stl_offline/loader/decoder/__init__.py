"""From the bytes of a packed image to the pixels of a crop, in compiled code."""

from stl_offline.loader.decoder.decode import DECODER, ViewCrop
from stl_offline.loader.decoder.native import next_item

__all__ = ["DECODER", "ViewCrop", "next_item"]
