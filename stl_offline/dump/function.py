"""Label sets from any function of images: segmentation models, zero-shot classifiers, models that are not timm's.

B: batch; Gh × Gw: the token grid, N = Gh·Gw; K: classes.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.dump.job import DumpReport, dump_labels
from stl_offline.errors import InputError

# Settings of `DumpConfig` that say how a labeler is built.
_BUILDS = ("labeler_checkpoint", "labeler_pretrained", "labeler_classes", "labeler_by_order")


class FunctionLabeler(nn.Module):
    """A function as a labeler, in `TokenLabeler`'s place. Arguments: as of `label_with`; size: side of the images."""

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        name: str,
        class_names: Sequence[str],
        grid: tuple[int, int],
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        weights_sha256: str,
    ) -> None:
        super().__init__()
        self._function, self._grid = function, (int(grid[0]), int(grid[1]))
        self.name, self.class_names, self.num_classes = name, tuple(class_names), len(class_names)
        self.img_size, self.mean, self.std = (size, size), tuple(mean), tuple(std)
        self.weights_sha256, self.interpolation = weights_sha256, "area"

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(Gh, Gw)."""
        return self._grid

    def forward(self, images: Tensor) -> tuple[Tensor | None, Tensor]:
        """What the function gives: class logits (B, K) or None, and token logits (B, N, K); float32."""
        found = self._function(images)
        class_logits, token_logits = found if isinstance(found, tuple) else (None, found)
        expected = (len(images), self._grid[0] * self._grid[1], self.num_classes)
        if tuple(token_logits.shape) != expected:
            raise InputError(
                f"the function {self.name} gives {tuple(token_logits.shape)}, expected (B, N, K) = {expected} for a "
                f"grid of {self._grid[0]}×{self._grid[1]} tokens and {self.num_classes} class names"
            )
        return None if class_logits is None else class_logits.float(), token_logits.float()


def label_with(
    function: Callable[[Tensor], Any],
    config: DumpConfig,
    *,
    class_names: Sequence[str],
    grid: tuple[int, int],
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    weights: str = "",
) -> DumpReport:
    """Write a label set of whatever a function gives for images, as `dump_labels` does of a labeler.

    Args:
        function: normalised images (B, 3, H, W) on the job's device → token logits (B, N, K) in row order (their
            softmax is stored), or (class logits (B, K), token logits). Called without gradients. Every token must be
            about its cell of the image alone; the cells cover the image.
        config: as for `dump_labels`; ``labeler`` is the name that the manifest records, ``img_size`` the images' side.
        class_names: K names, recorded in the set.
        grid: (Gh, Gw).
        mean, std: of the images' normalisation, for values in [0, 1].
        weights: what tells the function's weights from others, such as a file's SHA-256 or a version; recorded as a
            hash, so that a set is only continued with the same.

    Raises:
        StlError: as `dump_labels`; or logits of another shape.

    Example:
        ::

            def segments(images):  # per-pixel classes, averaged over each token's cell
                pixels = model(images)["out"].softmax(dim=1)
                return adaptive_avg_pool2d(pixels, (14, 14)).log().flatten(2).transpose(1, 2)

            config = DumpConfig(data="images/train", labeler="fcn", out="labels", img_size=224, top_k=5)
            label_with(segments, config, class_names=names, grid=(14, 14))
    """
    defaults = {field.name: field.default for field in dataclasses.fields(DumpConfig)}
    if given := [name for name in _BUILDS if getattr(config, name) != defaults[name]]:
        raise InputError(f"`{given[0]}` does nothing where a function labels; leave it out")
    if not config.img_size:
        raise InputError("a function has no input size of its own: give `img_size`")
    if config.class_top_k or config.class_draws:
        # Seen once before the job: a function that gives no class logits would fail on the first batch otherwise.
        with torch.inference_mode():
            found = function(torch.zeros(1, 3, config.img_size, config.img_size, device=pick_device(config.device)))
        if not isinstance(found, tuple):
            raise InputError("`class_top_k` and `class_draws` need a function that gives class logits, too")
    labeler = FunctionLabeler(
        function,
        config.labeler,
        class_names,
        grid,
        config.img_size,
        config.labeler_mean or mean,
        config.labeler_std or std,
        hashlib.sha256(weights.encode()).hexdigest(),
    )
    return dump_labels(config, labeler=labeler)
