"""A box of an image, resized to fill an output: down the columns first, then along each row.

H, W: the output's size; h, w: a plane's.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.loader.decoder.lines import (
    LINE_SLACK,
    enlarge_line,
    join_colours,
    resample_line,
    to_bytes,
    weighted_rows,
)
from stl_offline.loader.decoder.resample import (
    enlarging_weights,
    filter_weights,
    kept_weights,
    through_shrinking,
    through_upsampling,
)


def line_floats(width: int, output_width: int) -> int:
    """How many float32 of scratch resizing takes, for images and outputs at most so wide."""
    return 3 * output_width + 8 * (width + 8) + LINE_SLACK


def make_filters(kind: int, height: int, width: int) -> tuple:
    """What resizing to H × W by a filter takes: its number, and weights along either axis that are known beforehand."""
    down = enlarging_weights(kind, height)
    return kind, *down, *(down if width == height else enlarging_weights(kind, width))


@njit(inner=True)
def resize_pixels(data, pitch, box, mirrored, filters, lines, target):
    """Resize a box of red, green and blue to fill ``target``.

    data: uint8, one-dimensional, an image of rows of ``pitch`` bytes; box: (top, bottom, left, right) in pixels;
    filters: of `make_filters`; lines: float32 (`line_floats`,), finite; target: uint8 (H, W · 3).
    """
    rows, columns = target.shape[0], target.shape[1] // 3
    top, bottom, left, right = box
    height, width = bottom - top, right - left
    kind = filters[0]
    tops, down, _ = kept_weights(kind, height, rows, filters[1], filters[2], filters[3])
    lefts, across, used = kept_weights(kind, width, columns, filters[4], filters[5], filters[6])
    result = lines[: 3 * columns]
    line = lines[3 * columns + LINE_SLACK :]
    for row in range(rows):
        weighted_rows(data, (top + tops[row]) * pitch + 3 * left, pitch, down[row], line[: 3 * width])
        resample_line(line, np.int64(0), lefts, across, used, mirrored, result)
        to_bytes(result, target[row])


@njit(inner=True)
def resize_planes(data, planes, box, sizes, shrink, mirrored, kind, lines, target):
    """Resize a box of planes of brightness and colours to fill ``target``.

    data: uint8, one-dimensional; planes: the `Planes` in it, of an image of ``sizes`` (rows, columns), all ``shrink``
    times smaller; box: (top, left, height, width) in pixels of the image; kind: the filter's number; lines: float32
    (`line_floats`,), finite; target: uint8 (H, W · 3).
    """
    rows, columns = target.shape[0], target.shape[1] // 3
    across, down = planes.across, planes.down
    tops, row_weights, _ = filter_weights(kind, box[0], box[2], rows, sizes[0])
    lefts, weights, used = filter_weights(kind, box[1], box[3], columns, sizes[1])
    colour_tops, colour_weights = tops, row_weights
    colour_rows = sizes[0]
    if down > 1:
        colour_rows = -(-colour_rows // down)
        colour_tops, colour_weights = through_upsampling(tops, row_weights, colour_rows)
    if shrink > 1:
        tops, row_weights, _ = through_shrinking(tops, row_weights, shrink, -(-sizes[0] // shrink))
        colour_tops, colour_weights, _ = through_shrinking(
            colour_tops, colour_weights, shrink, -(-colour_rows // shrink)
        )
        lefts, weights, used = through_shrinking(lefts, weights, shrink, -(-sizes[1] // shrink))
    # The columns in use, from one on that begins a stored colour, and those colours with a neighbour on either side.
    begin = lefts[0] // across * across
    colours = -(-(min(lefts[columns - 1] + used, planes.w) - begin) // across)
    width = colours * across
    before = begin // across - 1
    colour_pitch = planes.w // across
    known, end = max(before, 0), min(before + colours + 2, colour_pitch)
    result = lines[: 3 * columns]
    line = lines[3 * columns + LINE_SLACK :]
    brightness = line[3 * width : 4 * width]
    spare = line[4 * width :]
    first, second = spare[:width], spare[width : 2 * width]
    stored = spare[2 * width : 2 * width + colours + 2]
    for row in range(rows):
        weighted_rows(data, planes.start + tops[row] * planes.w + begin, planes.w, row_weights[row], brightness)
        for number in range(2):
            start = planes.start + planes.h * planes.w + number * (planes.h // down) * colour_pitch
            start += colour_tops[row] * colour_pitch + known
            weighted_rows(data, start, colour_pitch, colour_weights[row], stored[known - before : end - before])
            if known > before:
                stored[0] = stored[1]
            if end < before + colours + 2:
                stored[colours + 1] = stored[colours]
            enlarge_line(stored, across, shrink > 1, second if number else first)
        join_colours(brightness, first, second, line)
        resample_line(line, begin, lefts, weights, used, mirrored, result)
        to_bytes(result, target[row])
