"""From the bytes of a packed image to the pixels of a crop, in compiled code."""

from stl_offline.loader.decoder.decode import DECODER, ViewCrop

__all__ = ["DECODER", "ViewCrop"]
