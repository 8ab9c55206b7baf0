"""Resizing a box of a picture: separable filters on planes of bytes, with exact fractions of pixels at the edges.

Filters, each along one axis, s source pixels to an output pixel:

- ``area``: the mean over the output pixel's own stretch of the source (OpenCV's INTER_AREA).
- ``bilinear``, ``bicubic``: the triangle, and Keys' cubic with a = −½, widened by s where that is above one. That is
  Pillow's and torchvision's ``antialias=True``; nothing outside the box is looked at.

A JPEG's colours are mostly stored at half its size. libjpeg first enlarges them (its "fancy upsampling" is a triangle,
too), then filters; here both steps become one table of weights, so the enlarged planes are never made.

H, W: the output's size; t: weights of an output pixel.
"""

import numpy as np
from numba import njit

from stl_offline.config import INTERPOLATIONS

AREA, BILINEAR, _BICUBIC = range(len(INTERPOLATIONS))
_ONE, _TWO, _THREE, _FOUR, _FIVE, _SIX, _SEVEN = (np.uint64(number) for number in range(1, 8))
_EPSILON = 1e-6  # of a pixel: boxes are computed from float32 views


@njit(cache=True, nogil=True)
def filter_weights(kind, start, length, outputs, pixels):
    """Weights along one axis for the box [start, start + length) of ``pixels`` source pixels.

    Returns ``firsts`` int64 (outputs,) and ``weights`` float32 (outputs, t): output i is the sum over j of
    ``weights[i, j]`` · source[``firsts[i]`` + j]. t is a multiple of four; rows are padded with zeros, also beyond
    the last source pixel.
    """
    scale = length / outputs
    wide = max(scale, 1.0)
    reach = scale / 2 if kind == AREA else wide * (1.0 if kind == BILINEAR else 2.0)
    taps = int(np.ceil(2 * reach)) + 2
    lowest = int(np.floor(start + _EPSILON))
    highest = min(int(np.ceil(start + length - _EPSILON)), pixels)
    firsts = np.empty(outputs, dtype=np.int64)
    weights = np.zeros((outputs, taps), dtype=np.float32)
    for output in range(outputs):
        centre = start + (output + 0.5) * scale
        if kind == AREA:
            first = max(int(np.floor(centre - reach + _EPSILON)), lowest)
            end = min(int(np.ceil(centre + reach - _EPSILON)), highest)
        else:
            first = max(int(np.floor(centre - reach + 0.5)), lowest)
            end = min(int(np.floor(centre + reach + 0.5)), highest)
        first = min(first, highest - 1)
        end = min(max(end, first + 1), first + taps)
        total = 0.0
        for pixel in range(first, end):
            if kind == AREA:
                weight = min(pixel + 1.0, centre + reach) - max(np.float64(pixel), centre - reach)
            else:
                weight = _kernel(kind, (pixel + 0.5 - centre) / wide)
            weights[output, pixel - first] = weight
            total += weight
        if total > 0:
            weights[output] /= np.float32(total)
        else:
            weights[output, 0] = 1.0
        firsts[output] = first
    return firsts, _trimmed(weights)


@njit(cache=True, nogil=True)
def through_shrinking(firsts, weights, shrink, pixels):
    """The weights on a plane whose ``pixels`` pixels are the means of ``shrink`` of those that ``weights`` are for.

    A JPEG that is decoded at 1/n gives exactly such means. What lies within one is taken from the slope between its
    neighbours, so a box that falls on whole means comes out exactly, any other to second order.
    """
    outputs, taps = weights.shape
    narrow_firsts = np.empty(outputs, dtype=np.int64)
    narrow = np.zeros((outputs, taps // shrink + 5), dtype=np.float32)
    for output in range(outputs):
        low = min(max(firsts[output] // shrink - 1, 0), pixels - 1)
        narrow_firsts[output] = low
        for tap in range(taps):
            weight = weights[output, tap]
            if weight == 0.0:
                continue
            wide = firsts[output] + tap
            mean = min(wide // shrink, pixels - 1)
            before, after = max(mean - 1, 0), min(mean + 1, pixels - 1)
            slope = np.float32(0.0)
            if after > before:
                slope = weight * np.float32((wide % shrink + 0.5 - shrink / 2) / (shrink * (after - before)))
            narrow[output, mean - low] += weight
            narrow[output, after - low] += slope
            narrow[output, before - low] -= slope
    return narrow_firsts, _trimmed(narrow)


@njit(cache=True, nogil=True)
def _trimmed(weights):
    """Only as many columns as are in use, and a multiple of four."""
    outputs, taps = weights.shape
    used = taps
    while used > 1 and not weights[:, used - 1].any():
        used -= 1
    trimmed = np.zeros((outputs, (used + 3) // 4 * 4), dtype=np.float32)
    trimmed[:, :used] = weights[:, :used]
    return trimmed


@njit(cache=True, nogil=True)
def _kernel(kind, x):
    x = abs(x)
    if kind == BILINEAR:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(cache=True, nogil=True)
def through_upsampling(firsts, weights, factor, pixels):
    """The weights on a plane of ``pixels`` that libjpeg would enlarge by ``factor`` before they are used.

    By two, an enlarged pixel is ¾ of the nearer and ¼ of the farther stored one; by any other factor a plain copy.
    """
    outputs, taps = weights.shape
    narrow_firsts = np.empty(outputs, dtype=np.int64)
    narrow = np.zeros((outputs, taps // factor + 3), dtype=np.float32)
    for output in range(outputs):
        low = max((firsts[output] - 1) // factor if factor == 2 else firsts[output] // factor, 0)
        low = min(low, pixels - 1)
        narrow_firsts[output] = low
        for tap in range(taps):
            weight = weights[output, tap]
            if weight == 0.0:
                continue
            enlarged = firsts[output] + tap
            near = min(enlarged // factor, pixels - 1)
            if factor == 2:
                far = near + 1 if enlarged % 2 else near - 1
                far = min(max(far, 0), pixels - 1)
                narrow[output, near - low] += np.float32(0.75) * weight
                narrow[output, far - low] += np.float32(0.25) * weight
            else:
                narrow[output, near - low] += weight
    return narrow_firsts, _trimmed(narrow)


@njit(cache=True, nogil=True)
def resample_row(plane, first_row, row_weights, firsts, column_weights, line, result):
    """One output row of one plane.

    plane: uint8 (h, w); first_row, row_weights: this row's source rows; firsts (W,), column_weights (W, t); line:
    float32 scratch, at least w + t long and finite everywhere; result: float32 (W,).
    """
    outputs, taps = column_weights.shape
    rows, width = plane.shape
    begin = firsts[0]
    end = min(firsts[outputs - 1] + taps, width)
    _weighted_rows(
        plane[:, begin:end], first_row, min(len(row_weights), rows - first_row), row_weights, line[begin:end]
    )
    # Written out by hand: as an inner loop over the weights this is six times as slow.
    if taps <= 4:
        for output in range(outputs):
            at = np.uint64(firsts[output])
            result[output] = (
                column_weights[output, 0] * line[at]
                + column_weights[output, 1] * line[at + _ONE]
                + column_weights[output, 2] * line[at + _TWO]
                + column_weights[output, 3] * line[at + _THREE]
            )
        return
    if taps <= 8:
        for output in range(outputs):
            at = np.uint64(firsts[output])
            result[output] = (
                column_weights[output, 0] * line[at]
                + column_weights[output, 1] * line[at + _ONE]
                + column_weights[output, 2] * line[at + _TWO]
                + column_weights[output, 3] * line[at + _THREE]
                + column_weights[output, 4] * line[at + _FOUR]
                + column_weights[output, 5] * line[at + _FIVE]
                + column_weights[output, 6] * line[at + _SIX]
                + column_weights[output, 7] * line[at + _SEVEN]
            )
        return
    for output in range(outputs):
        at = np.uint64(firsts[output])
        total = np.float32(0.0)
        for tap in range(0, taps, 4):
            total += (
                column_weights[output, tap] * line[at]
                + column_weights[output, tap + 1] * line[at + _ONE]
                + column_weights[output, tap + 2] * line[at + _TWO]
                + column_weights[output, tap + 3] * line[at + _THREE]
            )
            at += _FOUR
        result[output] = total


@njit(cache=True, nogil=True)
def _weighted_rows(plane, first_row, count, row_weights, line):
    # Loops that start at zero: with another start numba cannot rule out negative indices, and nothing is vectorised.
    row = plane[first_row]
    weight = row_weights[0]
    for x in range(len(line)):
        line[x] = weight * np.float32(row[x])
    for number in range(1, count):
        weight = row_weights[number]
        if weight == 0.0:
            continue
        row = plane[first_row + number]
        for x in range(len(line)):
            line[x] += weight * np.float32(row[x])


@njit(cache=True, nogil=True)
def write_row(lines, is_rgb, mirrored, target):
    """Three lines of float32 (3, W), red green blue or JPEG's Y Cb Cr (JFIF 1.02), to one row of bytes (W, 3)."""
    width = target.shape[0]
    for column in range(width):
        first = lines[0, column]
        second = lines[1, column]
        third = lines[2, column]
        if is_rgb:
            red, green, blue = first, second, third
        else:
            blueness = second - np.float32(128.0)
            redness = third - np.float32(128.0)
            red = first + np.float32(1.402) * redness
            green = first - np.float32(0.344136286) * blueness - np.float32(0.714136286) * redness
            blue = first + np.float32(1.772) * blueness
        place = width - 1 - column if mirrored else column
        target[place, 0] = _to_byte(red)
        target[place, 1] = _to_byte(green)
        target[place, 2] = _to_byte(blue)


@njit(cache=True, nogil=True, inline="always")
def _to_byte(value):
    return np.uint8(min(max(value + np.float32(0.5), np.float32(0.0)), np.float32(255.0)))
