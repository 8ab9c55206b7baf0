"""Resizing a box of an image: separable filters on planes of bytes, with exact fractions of pixels at the edges.

Filters, each along one axis, s source pixels to an output pixel:

- ``area``: the mean over the output pixel's own stretch of the source (OpenCV's INTER_AREA).
- ``bilinear``, ``bicubic``: the triangle, and Keys' cubic with a = −½, widened by s where that is above one. That is
  Pillow's and torchvision's ``antialias=True``; nothing outside the box is looked at.

A JPEG's colours are mostly stored at half its size. libjpeg first enlarges them (its "fancy upsampling" is a triangle,
too), then filters; down the columns both steps become one table of weights here, so the enlarged planes are never made
(along a row colours are enlarged as they stand, `stl_offline.loader.decoder.lines`).

H, W: the output's size; t: weights of an output pixel.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.config import INTERPOLATIONS

AREA, BILINEAR, _BICUBIC = range(len(INTERPOLATIONS))
_EPSILON = 1e-6  # of a pixel: boxes are computed from float32 views
# Weights are kept for boxes of at most so many pixels: larger images take so long that theirs cost nothing.
_LONGEST_KEPT = 256
_ENLARGING_TAPS = 4


@njit
def filter_weights(kind, start, length, outputs, pixels):
    """Weights along one axis for the box [start, start + length) of ``pixels`` source pixels.

    Returns ``firsts`` int64 (outputs,), ``weights`` float32 (outputs, t) and ``used``: output i is the sum over j of
    ``weights[i, j]`` · source[``firsts[i]`` + j]. t is a multiple of four; no row has more than ``used`` weights, the
    others are zeros, also beyond the last source pixel.
    """
    scale = length / outputs
    wide = max(scale, 1.0)
    narrow = 1.0 / wide
    reach = scale / 2 if kind == AREA else wide * (1.0 if kind == BILINEAR else 2.0)
    taps = int(np.ceil(2 * reach)) + (1 if kind == AREA else 0)
    lowest = int(np.floor(start + _EPSILON))
    highest = min(int(np.ceil(start + length - _EPSILON)), pixels)
    firsts = np.empty(outputs, dtype=np.int64)
    weights = np.zeros((outputs, (taps + 3) // 4 * 4), dtype=np.float32)
    used = 1
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
        for tap in range(end - first):
            pixel = np.float64(first + tap)
            if kind == AREA:
                weight = min(pixel + 1.0, centre + reach) - max(pixel, centre - reach)
            else:
                weight = _kernel(kind, (pixel + 0.5 - centre) * narrow)
            weights[output, tap] = weight
            total += weight
        if total > 0:
            share = np.float32(1.0 / total)
            for tap in range(end - first):
                weights[output, tap] *= share
        else:
            weights[output, 0] = 1.0
        firsts[output] = first
        used = max(used, end - first)
    return firsts, weights, used


def enlarging_weights(kind: int, outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `filter_weights` gives for whole pixels that are no more than the outputs, ahead of time.

    Returns firsts int64 (L, outputs), weights float32 (L, outputs, 4) and used int64 (L,), by the box's length from 0
    to L − 1; 0 is no box.
    """
    lengths = min(outputs, _LONGEST_KEPT) + 1
    firsts = np.zeros((lengths, outputs), dtype=np.int64)
    weights = np.zeros((lengths, outputs, _ENLARGING_TAPS), dtype=np.float32)
    used = np.ones(lengths, dtype=np.int64)
    for length in range(1, lengths):
        firsts[length], weights[length], used[length] = filter_weights(kind, 0.0, float(length), outputs, length)
    return firsts, weights, used


@njit(inline=True)
def kept_weights(kind, length, outputs, firsts, weights, used):
    """`filter_weights` for ``length`` whole pixels, from the tables of `enlarging_weights` if they have it."""
    if length < len(used):
        return firsts[length], weights[length], used[length]
    return filter_weights(kind, 0.0, float(length), outputs, length)


@njit(inner=True)
def through_shrinking(firsts, weights, shrink, pixels):
    """The weights on a plane whose ``pixels`` pixels are the means of ``shrink`` of those that ``weights`` are for.

    A JPEG that is decoded at 1/n gives exactly such means. What lies within one is taken from the slope between its
    neighbours, so a box that falls on whole means comes out exactly, any other to second order.
    """
    outputs, taps = weights.shape
    narrow_firsts = np.empty(outputs, dtype=np.int64)
    narrow = np.zeros((outputs, (taps // shrink + 5 + 3) // 4 * 4), dtype=np.float32)
    used = 1
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
            used = max(used, after - low + 1)
    return narrow_firsts, narrow, used


@njit(inline=True)
def _kernel(kind, x):
    x = abs(x)
    if kind == BILINEAR:
        return max(1.0 - x, 0.0)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(inline=True)
def through_upsampling(firsts, weights, pixels):
    """The weights on a plane of ``pixels`` that libjpeg would enlarge by two before they are used.

    An enlarged pixel is ¾ of the nearer and ¼ of the farther stored one.
    """
    outputs, taps = weights.shape
    narrow_firsts = np.empty(outputs, dtype=np.int64)
    narrow = np.zeros((outputs, taps // 2 + 3), dtype=np.float32)
    for output in range(outputs):
        low = min(max((firsts[output] - 1) // 2, 0), pixels - 1)
        narrow_firsts[output] = low
        for tap in range(taps):
            weight = weights[output, tap]
            if weight == 0.0:
                continue
            enlarged = firsts[output] + tap
            near = min(enlarged // 2, pixels - 1)
            far = min(max(near + 1 if enlarged % 2 else near - 1, 0), pixels - 1)
            narrow[output, near - low] += np.float32(0.75) * weight
            narrow[output, far - low] += np.float32(0.25) * weight
    return narrow_firsts, narrow
