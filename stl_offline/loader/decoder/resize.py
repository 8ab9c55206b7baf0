"""A box of an image, resized to fill an output: down the columns first, then along each row.

H, W: the output's size; h, w: a plane's.
"""

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


@njit
def resize_pixels(pixels, top, bottom, left, right, mirrored, filters, lines, target):
    """Resize rows top:bottom and columns left:right of red, green and blue to fill ``target``.

    pixels: uint8 (h, w, 3); filters: of `make_filters`; lines: float32 (`line_floats`,), finite; target: uint8
    (H, W, 3).
    """
    rows, columns = target.shape[0], target.shape[1]
    height, width = bottom - top, right - left
    kind = filters[0]
    tops, down, _ = kept_weights(kind, height, rows, filters[1], filters[2], filters[3])
    lefts, across, used = kept_weights(kind, width, columns, filters[4], filters[5], filters[6])
    box = pixels.reshape((pixels.shape[0], 3 * pixels.shape[1]))[top:bottom, 3 * left : 3 * right]
    written = target.reshape((rows, 3 * columns))
    result = lines[: 3 * columns]
    line = lines[3 * columns + LINE_SLACK :]
    for row in range(rows):
        weighted_rows(box, tops[row], down[row], line[: 3 * width])
        resample_line(line, 0, lefts, across, used, mirrored, result)
        to_bytes(result, written[row])


@njit
def resize_planes(planes, box, sizes, shrink, across, down, mirrored, kind, lines, target):
    """Resize a box of planes of brightness and colours to fill ``target``.

    planes: three uint8 (h, w), of an image of ``sizes`` (rows, columns), all ``shrink`` times smaller, the second and
    third also ``down`` and ``across`` times; box: (top, left, height, width) in pixels of the image; kind: the
    filter's number; lines: float32 (`line_floats`,), finite; target: uint8 (H, W, 3).
    """
    rows, columns = target.shape[0], target.shape[1]
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
    colours = -(-(min(lefts[columns - 1] + used, planes[0].shape[1]) - begin) // across)
    width = colours * across
    before = begin // across - 1
    known, end = max(before, 0), min(before + colours + 2, planes[1].shape[1])
    result = lines[: 3 * columns]
    line = lines[3 * columns + LINE_SLACK :]
    brightness = line[3 * width : 4 * width]
    spare = line[4 * width :]
    narrow = spare[: 2 * (colours + 2)].reshape((2, colours + 2))
    wide = spare[2 * (colours + 2) : 2 * (colours + 2) + 2 * width].reshape((2, width))
    written = target.reshape((rows, 3 * columns))
    for row in range(rows):
        weighted_rows(planes[0][:, begin : begin + width], tops[row], row_weights[row], brightness)
        for number in (0, 1):
            stored_line = narrow[number]
            plane = planes[1] if number == 0 else planes[2]
            weighted_rows(
                plane[:, known:end], colour_tops[row], colour_weights[row], stored_line[known - before : end - before]
            )
            if known > before:
                stored_line[0] = stored_line[1]
            if end < before + colours + 2:
                stored_line[colours + 1] = stored_line[colours]
            enlarge_line(stored_line, across, shrink > 1, wide[number])
        join_colours(brightness, wide[0], wide[1], line)
        resample_line(line, begin, lefts, weights, used, mirrored, result)
        to_bytes(result, written[row])
