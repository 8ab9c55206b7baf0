"""What a training step receives.

B: batch; H, W: image; N: tokens; m: targets per token. On the way: FFCV's buffers are reused, so everything here is a
copy.
"""

from dataclasses import dataclass

import numpy as np
import torch

from stl_offline.compiled import njit
from stl_offline.device import upload


@dataclass
class Batch:
    """Images, classes and token targets of some samples, all on the loader's device but where said.

    images: float32 (B, 3, H, W), normalised, channels last in memory. class_ids: int64 (B,). token_ids: int64
    (B, N, m), −1 for "no class": with a weight above zero that weight is spread evenly over all classes, else nothing
    is there; None without token targets. token_weights: float32 (B, N, m) or None. On the CPU: sample_ids, int64 (B,),
    positions in the .beton; views, float32 (B, 6), the rows of the 2×3 view that each sample's targets are for; epochs,
    int64 (B,), those whose draws each sample is shown with; warps, float32 (B, 6) or None: the last part of the view,
    which the pixels still lack (`stl_offline.augment` moves them).
    """

    images: torch.Tensor
    class_ids: torch.Tensor
    token_ids: torch.Tensor | None
    token_weights: torch.Tensor | None
    views: torch.Tensor
    sample_ids: torch.Tensor
    epochs: torch.Tensor
    warps: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.class_ids)


class ToDevice:
    """Copies one batch out of FFCV's buffers: images become normalised floats on the device."""

    def __init__(self, device: torch.device, image_width: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.device = device
        # (pixel / 255 − mean) / std as one multiplication and one addition; repeated along a row of pixels, since
        # long innermost runs are what makes this fast.
        scale = 1.0 / (255.0 * np.asarray(std, dtype=np.float64))
        shift = -np.asarray(mean, dtype=np.float64) / np.asarray(std, dtype=np.float64)
        self._scale = torch.tensor(scale, dtype=torch.float32, device=device).repeat(image_width)
        self._shift = torch.tensor(shift, dtype=torch.float32, device=device).repeat(image_width)

    def images(self, pixels_BHWC: np.ndarray) -> torch.Tensor:
        """uint8 (B, H, W, 3) → float32 (B, 3, H, W), channels last."""
        count, height, width, channels = pixels_BHWC.shape
        if self.device.type == "cpu":
            images = torch.empty((count, height, width, channels), dtype=torch.float32)
            rows = (count * height, width * channels)
            _normalise(
                pixels_BHWC.reshape(rows), self._scale.numpy(), self._shift.numpy(), images.numpy().reshape(rows)
            )
        else:
            rows = torch.from_numpy(pixels_BHWC).reshape(count, height, width * channels)
            images = upload(rows, self.device, torch.float32)
            images = images.mul_(self._scale).add_(self._shift).view(count, height, width, channels)
        return images.permute(0, 3, 1, 2)

    def copy(self, array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        """A copy of an array on the device."""
        if self.device.type == "cpu":
            copied = torch.empty(array.shape, dtype=dtype)
            np.copyto(copied.numpy(), array)  # on one core, as `_normalise` and for its reason
            return copied
        return upload(array, self.device, dtype)


@njit
def _normalise(pixels, scale, shift, images):
    """Rows of uint8 → rows of float32. One pass on one core takes a tenth of the processor time of torch's three.

    Those run on all cores, whose threads then wait for more by spinning, while the loader's could work.
    """
    for row in range(pixels.shape[0]):
        for place in range(pixels.shape[1]):
            images[row, place] = np.float32(pixels[row, place]) * scale[place] + shift[place]
