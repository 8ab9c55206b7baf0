"""What images of any kind are as 8-bit RGB: the same wherever labels are made, and wherever they are used."""

import numpy as np
from PIL import Image

from stl_offline.errors import InputError

# The formats that are read; PIL has others, some of which start other programs. MPO (two JPEGs in a file) is opened as
# JPEG; PIL knows no opener by that name.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")


class ImageError(InputError):
    """An image cannot be read, is damaged, or is of a kind that has no meaning as RGB. advice: what to do about it."""

    def __init__(self, reason: str, advice: str = "repair or remove it") -> None:
        super().__init__(reason)
        self.advice = advice


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded image of any kind as 8-bit RGB; 16-bit grey is scaled, not clipped.

    Raises:
        ImageError: the image cannot be decoded, or its pixels are floating-point numbers or beyond 16 bits.
    """
    try:
        image.load()
        if image.mode == "F":
            raise ImageError("pixels are floating-point numbers, whose range is unknown; convert it to 8 bits")
        if image.mode == "I" or image.mode.startswith("I;16"):
            wide = np.asarray(image).astype(np.int64)
            if wide.min() < 0 or wide.max() > 65_535:
                raise ImageError("pixels have more than 16 bits, whose range is unknown; convert it to 8 bits")
            image = Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except Exception as error:  # PIL's decoders raise nearly every built-in on bad bytes
        raise ImageError(f"cannot be decoded: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What an error says, or else its name, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
