"""From stored bytes to planes: a JPEG's brightness and colours as they are stored, or red, green and blue.

A JPEG keeps its colours apart from its brightness, mostly at half the size. Decoding stops there: enlarging the colours
and turning them into red, green and blue is left to the few pixels that come out of the resizing. Where a crop is to
become much smaller, the image is decoded at ½, ¼ or ⅛ of its size, from the low frequencies alone.

H, W: the image's size; h, w: a plane's.
"""

from typing import NamedTuple

import numpy as np

from stl_offline.compiled import njit
from stl_offline.loader.decoder.native import (
    TJCS_YCBCR,
    TJERR_WARNING,
    TJFLAG_ACCURATEDCT,
    TJPF_RGB,
    tj_decompress,
    tj_error_code,
    tj_header,
    tj_planes,
)

NOTES_INTS = 16  # int64 a worker, two cache lines: TurboJPEG writes what it finds there
# By TurboJPEG's number of the subsampling (4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1): how many times the colours are
# smaller. Grey has no colours, and what is not in the table takes the long way.
_ACROSS = np.array([1, 2, 2, 0, 1, 4])
_DOWN = np.array([1, 1, 2, 0, 2, 1])


def scratch_bytes(height: int, width: int, stored: int) -> int:
    """What `read_planes` and `read_rgb` may need for an image of this size that takes ``stored`` bytes."""
    return 3 * (height + 4) * (width + 4) + stored


class Planes(NamedTuple):
    """Where planes lie in a worker's memory.

    Brightness from byte ``start`` on, uint8 (h, w), behind it both colours, each (h // down, w // across).
    """

    start: int
    h: int
    w: int
    across: int
    down: int


@njit(inner=True)
def read_planes(handle, data, height, width, bottom, shrink, may_cut, scratch, notes):
    """Decode a JPEG into planes of brightness and colours at 1/``shrink`` of its size.

    data: uint8, the file; height, width: what it must have; shrink: 1, 2, 4 or 8; may_cut: the bytes are known to be
    sound, so that nothing below the rows above ``bottom`` needs to be looked at; scratch: uint8, `scratch_bytes`;
    notes: int64 (`NOTES_INTS`,).

    Returns (status, planes): status 0: `Planes` in ``scratch``, perhaps a little larger than the image, perhaps with
    fewer rows; 1: nothing, because it is stored in another way, for `read_rgb`; −1: damaged, or of another size.
    """
    at = notes.ctypes.data
    start = 0
    # TurboJPEG's head is refused for samplings of colours that it has no name for, which it decodes all the same.
    if not _read_head(handle, data, height, width, notes):
        return 1, Planes(start, height, width, 1, 1)
    subsampling, colour_space = notes[2], notes[3]
    across = down = 0
    if colour_space == TJCS_YCBCR and 0 <= subsampling < len(_ACROSS):
        across, down = _ACROSS[subsampling], _DOWN[subsampling]
    if across == 0:
        return 1, Planes(start, height, width, 1, 1)
    # Enlarging colours and reading between shrunk pixels look at the next row of both. Blocks are decoded whole.
    needed = bottom + 2 * down * shrink
    rows_kept = -(-needed // (8 * down)) * 8 * down
    source = data.ctypes.data
    was_cut = may_cut and rows_kept < height and keep_rows(data, rows_kept, scratch)
    if was_cut:
        height = rows_kept
        # What was copied is as long as the file; the planes come behind it.
        start = data.size
        source = scratch.ctypes.data
    rows, columns = -(-height // shrink), -(-width // shrink)
    # TurboJPEG pads planes to whole groups of pixels that share a colour.
    h, w = -(-rows // down) * down, -(-columns // across) * across
    target = scratch.ctypes.data + start
    notes[4] = target
    notes[5] = target + h * w
    notes[6] = target + h * w + (h // down) * (w // across)
    # −1 also for warnings, as below.
    failed = tj_planes(handle, source, data.size, at + 32, columns, 0, rows, TJFLAG_ACCURATEDCT) != 0
    if failed and was_cut:
        # libjpeg wonders about the bytes that are left before the end mark.
        failed = tj_error_code(handle) != TJERR_WARNING
    return (-1 if failed else 0), Planes(start, h, w, across, down)


@njit(inner=True)
def keep_rows(data, rows, copy):
    """Copy a JPEG, claiming that it ends after ``rows`` rows: a decoder stops there and skips the rest.

    Only where it has all its colours in one scan without restart marks, so that what is skipped is one stretch of
    bytes before the end mark. Returns False, and leaves ``copy`` unfinished, where it has not, or is not understood.
    """
    place = 2
    components = 0
    place_of_rows = 0
    while place + 4 <= data.size and data[place] == 0xFF:
        marker = data[place + 1]
        length = np.int64(data[place + 2]) * 256 + data[place + 3]
        if marker == 0xC0 or marker == 0xC1:  # sequential, Huffman: length, precision, rows, columns, components
            if place + 10 > data.size:
                return False
            place_of_rows = place + 5
            components = data[place + 9]
        elif marker == 0xDA:  # the scan: length, its components
            if components == 0 or place + 5 > data.size or data[place + 4] != components:
                return False
            for at in range(data.size):  # a slice would compile the text of an error, too
                copy[at] = data[at]
            copy[place_of_rows] = rows // 256
            copy[place_of_rows + 1] = rows % 256
            return True
        elif marker == 0xDD or marker == 0xFF or (0xC2 <= marker <= 0xCF and marker != 0xC4):
            # Restart marks, fill bytes, and every other way of coding; 0xC4 is only a Huffman table.
            return False
        place += 2 + length
    return False


@njit(inner=True)
def read_rgb(handle, data, height, width, pixels, notes):
    """Decode a JPEG of any kind into ``pixels``, uint8 (≥ H·W·3,); False if it is damaged or of another size.

    Red, green and blue are to the bit those of Pillow.
    """
    # TurboJPEG reads the whole head to tell the size, and again to decode: a thirtieth of a small image's time.
    if frame_size(data) != (height, width) and not _read_head(handle, data, height, width, notes):
        return False
    source, target = data.ctypes.data, pixels.ctypes.data
    # −1 also for mere warnings, after which libjpeg has painted something over the damage. Packed JPEGs have none.
    return tj_decompress(handle, source, data.size, target, width, 3 * width, height, TJPF_RGB, TJFLAG_ACCURATEDCT) == 0


@njit(inline=True)
def frame_size(data):
    """(rows, columns) as a JPEG's frame header has them; zeros where a look at the segments before it does not lead."""
    place = 2
    while place + 9 <= data.size and data[place] == 0xFF:
        marker = data[place + 1]
        # 0xC4, 0xC8 and 0xCC are Huffman tables, reserved, and settings of arithmetic coding.
        if 0xC0 <= marker <= 0xCF and marker != 0xC4 and marker != 0xC8 and marker != 0xCC:
            return np.int64(data[place + 5]) * 256 + data[place + 6], np.int64(data[place + 7]) * 256 + data[place + 8]
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or marker == 0xFF:
            # No length follows, or pixels do, or a fill byte.
            break
        place += 2 + np.int64(data[place + 2]) * 256 + data[place + 3]
    return np.int64(0), np.int64(0)


@njit(inner=True)
def _read_head(handle, data, height, width, notes):
    """Whether a JPEG has this size; its width, height, subsampling and colour space into ``notes``."""
    at = notes.ctypes.data
    # TurboJPEG writes 32-bit numbers, here into little-endian memory that is cleared.
    notes[:] = 0
    if tj_header(handle, data.ctypes.data, data.size, at, at + 8, at + 16, at + 24) != 0:
        return False
    return notes[0] == width and notes[1] == height
