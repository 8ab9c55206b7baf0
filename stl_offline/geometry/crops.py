"""Random views, each a pure function of (seed, epoch, sample id), and the fixed ones of evaluation.

The distribution is that of torchvision's RandomResizedCrop (Szegedy et al., "Going deeper with convolutions", CVPR
2015, section 6): ten tries at an area and an aspect ratio, then the largest central crop of an allowed ratio; then a
left-to-right flip. Boxes fall on whole pixels of the source.

n: samples; a view is six float32, the rows of its 2×3 matrix.
"""

import numpy as np

from stl_offline.compiled import njit
from stl_offline.errors import InputError
from stl_offline.random import STREAM_VIEW, random_bits, unit_interval
from stl_offline.settings import CropSettings


def draw_views(
    seed: int, epoch: int, sample_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, settings: CropSettings
) -> np.ndarray:
    """Random views of many samples: ids, heights and widths (n,) → float32 (n, 6). Raises InputError if n differs."""
    if not len(sample_ids) == len(heights) == len(widths):
        raise InputError(
            f"each sample needs its height and width, got {len(sample_ids):,} ids, {len(heights):,} heights and "
            f"{len(widths):,} widths"
        )
    views = np.empty((len(sample_ids), 6), dtype=np.float32)
    _draw_views(
        np.uint64(seed % 2**64),
        np.uint64(epoch),
        np.asarray(sample_ids, dtype=np.uint64),
        np.asarray(heights, dtype=np.int64),
        np.asarray(widths, dtype=np.int64),
        np.array(settings.scale, dtype=np.float64),
        np.array(settings.ratio, dtype=np.float64),
        float(settings.flip),
        views,
    )
    return views


def whole_views(count: int) -> np.ndarray:
    """The identity view, once for each sample: float32 (n, 6)."""
    return np.tile(np.array([1, 0, 0, 0, 1, 0], dtype=np.float32), (count, 1))


def center_views(heights: np.ndarray, widths: np.ndarray, crop_pct: float = 1.0, aspect: float = 1.0) -> np.ndarray:
    """The largest central crop of the aspect ratio width/height, times ``crop_pct``: float32 (n, 6)."""
    if not 0 < crop_pct <= 1:
        raise InputError(f"`crop_pct` must lie in (0, 1], got {crop_pct}")
    heights = np.asarray(heights, dtype=np.float64)
    widths = np.asarray(widths, dtype=np.float64)
    crop_widths = np.maximum(1, np.round(np.minimum(widths, heights * aspect) * crop_pct))
    crop_heights = np.maximum(1, np.round(np.minimum(heights, widths / aspect) * crop_pct))
    views = np.zeros((len(heights), 6), dtype=np.float32)
    views[:, 0] = crop_widths / widths
    views[:, 2] = np.floor((widths - crop_widths) / 2) / widths
    views[:, 4] = crop_heights / heights
    views[:, 5] = np.floor((heights - crop_heights) / 2) / heights
    return views


@njit
def _draw_views(seed, epoch, sample_ids, heights, widths, scale, ratio, flip, views):
    low_ratio = np.log(ratio[0])
    high_ratio = np.log(ratio[1])
    for index in range(len(sample_ids)):
        sample_id = sample_ids[index]
        height = heights[index]
        width = widths[index]
        area = float(height) * float(width)
        left = 0
        top = 0
        crop_width = 0
        crop_height = 0
        for attempt in range(10):
            b0, b1, b2, b3 = random_bits(seed, STREAM_VIEW, epoch, sample_id, attempt)
            target = area * (scale[0] + (scale[1] - scale[0]) * unit_interval(b0))
            aspect = np.exp(low_ratio + (high_ratio - low_ratio) * unit_interval(b1))
            w = round(np.sqrt(target * aspect))
            h = round(np.sqrt(target / aspect))
            if 0 < w <= width and 0 < h <= height:
                left = int(unit_interval(b2) * (width - w + 1))
                top = int(unit_interval(b3) * (height - h + 1))
                crop_width = w
                crop_height = h
                break
        if crop_width == 0:
            crop_width = width
            crop_height = height
            if float(width) / float(height) < ratio[0]:
                crop_height = max(1, min(height, round(width / ratio[0])))
            elif float(width) / float(height) > ratio[1]:
                crop_width = max(1, min(width, round(height * ratio[1])))
            left = (width - crop_width) // 2
            top = (height - crop_height) // 2
        # The flip has a counter of its own, so that it does not depend on how many tries the box took.
        mirror = unit_interval(random_bits(seed, STREAM_VIEW, epoch, sample_id, 10)[0]) < flip
        unit_left = np.float32(left / width)
        unit_width = np.float32(crop_width / width)
        views[index, 0] = -unit_width if mirror else unit_width
        views[index, 1] = 0
        views[index, 2] = unit_left + unit_width if mirror else unit_left
        views[index, 3] = 0
        views[index, 4] = np.float32(crop_height / height)
        views[index, 5] = np.float32(top / height)
