"""Random erasing with timm's distribution, drawn as a pure function of (seed, epoch, sample).

Zhong et al., arXiv 1708.04896, as `timm.data.random_erasing` does it: with chance p, one box of 2 % to a third of the
image's area, sides' ratio log-uniform in [0.3, 1/0.3], wholly inside (ten tries).

n: samples; B: batch; H, W: image.
"""

import numpy as np
from torch import Tensor

from stl_offline.compiled import njit
from stl_offline.device import upload
from stl_offline.random import STREAM_ERASE, epoch_of_each, erase_generator, random_bits, unit_interval
from stl_offline.settings import EraseSettings

_TRIES = 10


class RandomErase(EraseSettings):
    """Draws the boxes that `EraseSettings` describes."""

    def draw(self, seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Boxes in pixels: y0, y1, x0, x1, int64 (n, 4), all zeros where nothing is erased.

        epoch: one for all, or int64 (n,); size: (H, W).
        """
        boxes = np.zeros((len(sample_ids), 4), dtype=np.int64)
        _draw_boxes(
            np.uint64(seed % 2**64),
            epoch_of_each(epoch, len(sample_ids)),
            np.asarray(sample_ids, dtype=np.uint64),
            *size,
            float(self.prob),
            *self.area,
            *(float(np.log(ratio)) for ratio in self.ratio),
            boxes,
        )
        return boxes


def erase_boxes(
    images: Tensor, boxes_B4: np.ndarray, mode: str, seed: int, epoch: int | np.ndarray, sample_ids: np.ndarray
) -> Tensor:
    """Fill each image's box: normalised (B, 3, H, W) → the same. The noise depends on (seed, epoch, sample) alone."""
    erased = np.flatnonzero((boxes_B4[:, 1] > boxes_B4[:, 0]) & (boxes_B4[:, 3] > boxes_B4[:, 2]))
    if len(erased) == 0:
        return images
    images = images.clone()
    channels, epochs = images.shape[1], epoch_of_each(epoch, len(images))
    shapes = [
        {"const": (0, 0, 0), "rand": (channels, 1, 1)}.get(mode, (channels, bottom - top, right - left))
        for top, bottom, left, right in boxes_B4[erased].tolist()
    ]
    noise = [
        erase_generator(seed, number, sample).standard_normal(shape, dtype=np.float32).ravel()
        for number, sample, shape in zip(epochs[erased].tolist(), sample_ids[erased].tolist(), shapes, strict=True)
    ]
    # One copy to the device for all of them.
    parts = upload(np.concatenate(noise), images.device).split([len(each) for each in noise])
    for row, shape, part in zip(erased.tolist(), shapes, parts, strict=True):
        top, bottom, left, right = boxes_B4[row].tolist()
        inside = images[row, :, top:bottom, left:right]
        if mode == "const":
            inside.zero_()
        else:
            inside.copy_(part.view(shape))
    return images


@njit
def _draw_boxes(seed, epochs, sample_ids, height, width, prob, low, high, log_low, log_high, boxes):
    area = float(height * width)
    for index in range(len(sample_ids)):
        epoch, sample = epochs[index], sample_ids[index]
        if unit_interval(random_bits(seed, STREAM_ERASE, epoch, sample, _TRIES)[0]) >= prob:
            continue
        for attempt in range(_TRIES):
            b0, b1, b2, b3 = random_bits(seed, STREAM_ERASE, epoch, sample, attempt)
            target = area * (low + (high - low) * unit_interval(b0))
            ratio = np.exp(log_low + (log_high - log_low) * unit_interval(b1))
            rows = round(np.sqrt(target * ratio))
            columns = round(np.sqrt(target / ratio))
            if rows < height and columns < width:
                top = int(unit_interval(b2) * (height - rows + 1))
                left = int(unit_interval(b3) * (width - columns + 1))
                boxes[index, 0] = top
                boxes[index, 1] = top + rows
                boxes[index, 2] = left
                boxes[index, 3] = left + columns
                break
