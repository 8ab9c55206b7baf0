"""One row of an output, as float32: from rows of bytes, to red, green and blue, along the row, to bytes.

w: pixels of a source row; W: of an output row.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.loader.decoder.native import blend_pixels

_COLOURS = 3
_FLOAT_BYTES = 4
_PIXEL_BYTES = _COLOURS * _FLOAT_BYTES
# `blend_pixels` reads and writes four numbers where three are meant.
LINE_SLACK = 4


@njit(inner=True)
def weighted_rows(data, start, pitch, row_weights, line):
    """The weighted sum of rows of bytes into ``line``, float32 (w,).

    data: uint8, one-dimensional, where the first row begins at ``start`` and each other one ``pitch`` after the one
    before. Rows of weight zero are not read, so they may lie beyond the end.
    """
    # Loops that start at zero: with another start numba cannot rule out negative indices, and nothing is vectorised.
    row = data[start:]
    weight = row_weights[0]
    for x in range(len(line)):
        line[x] = weight * np.float32(row[x])
    for number in range(1, len(row_weights)):
        weight = row_weights[number]
        if weight == 0.0:
            continue
        row = data[start + number * pitch :]
        for x in range(len(line)):
            line[x] += weight * np.float32(row[x])


@njit(inner=True)
def enlarge_line(narrow, factor, of_means, wide):
    """Colours that are stored ``factor`` times narrower, beside the brightness.

    narrow: float32, with one more at either end, for the neighbours; of_means: they are means over pixels (a JPEG
    decoded at 1/n), to be read along the slope between their neighbours, so that means stay; else they are enlarged as
    libjpeg does it ("fancy upsampling"): by two, a pixel is ¾ of the nearer and ¼ of the farther stored one; by any
    other factor a plain copy. wide: float32.
    """
    if of_means and factor > 1:
        for part in range(factor):
            share = np.float32(((part + 0.5) / factor - 0.5) / 2)
            for place in range(len(wide) // factor):
                slope = narrow[place + 2] - narrow[place]
                wide[factor * place + part] = narrow[place + 1] + share * slope
    elif factor == 2:
        for place in range(len(wide) // 2):
            near = np.float32(0.75) * narrow[place + 1]
            wide[2 * place] = near + np.float32(0.25) * narrow[place]
            wide[2 * place + 1] = near + np.float32(0.25) * narrow[place + 2]
    else:
        for place in range(len(wide)):
            wide[place] = narrow[place // factor + 1]


@njit(inner=True)
def join_colours(brightness, first, second, line):
    """JPEG's Y Cb Cr (JFIF 1.02), float32 (w,) each, to red, green and blue, float32 (w · 3,)."""
    for x in range(len(brightness)):
        blueness = first[x] - np.float32(128.0)
        redness = second[x] - np.float32(128.0)
        line[3 * x] = brightness[x] + np.float32(1.402) * redness
        line[3 * x + 1] = brightness[x] - np.float32(0.344136286) * blueness - np.float32(0.714136286) * redness
        line[3 * x + 2] = brightness[x] + np.float32(1.772) * blueness


@njit(inner=True)
def resample_line(line, begin, firsts, weights, used, mirrored, result):
    """Filter a row of pixels along itself.

    line: float32 (w · 3,), from pixel ``begin`` on, finite for four pixels more; firsts, weights, used: as
    `resample.filter_weights` gives them; mirrored: the last output comes first; result: float32
    (W · 3 + `LINE_SLACK`,).
    """
    outputs, taps = weights.shape
    source = np.int64(line.ctypes.data) - _PIXEL_BYTES * begin
    weight = np.int64(weights.ctypes.data)
    target = np.int64(result.ctypes.data)
    for output in range(outputs):
        place = np.uint64(outputs - 1 - output if mirrored else output)
        at = source + _PIXEL_BYTES * firsts[place]
        its = weight + np.int64(_FLOAT_BYTES * taps * place)
        if used <= 2:
            blend_pixels(at, its, target, 2, False)
        else:
            blend_pixels(at, its, target, 4, False)
            for tap in range(4, used, 4):
                blend_pixels(at + _PIXEL_BYTES * tap, its + _FLOAT_BYTES * tap, target, 4, True)
        target += _PIXEL_BYTES


@njit(inner=True)
def to_bytes(values, target):
    """Round float32 to uint8, both of one length, within 0 … 255."""
    for place in range(len(target)):
        # Limits of integers are those that processors keep by themselves when they make numbers narrower.
        target[place] = np.uint8(min(max(np.int32(values[place] + np.float32(0.5)), np.int32(0)), np.int32(255)))
