"""Semantic segmentation with SegFormer's all-MLP head (arXiv 2105.15203, section 3.2) on a backbone's feature maps.

B: batch; H, W: image; C: width of the head; K: classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl_offline.transfer.backbone import Backbone, BackboneSpec
from stl_offline.transfer.description import WIDEST, Description, load_trained

_LARGEST_CROP = 8192


class MlpHead(nn.Module):
    """One linear layer per map, all maps at the first one's size, one linear layer over them, one to the classes.

    Args:
        channels: of the feature maps.
        width: C.
        classes: K.
        dropout: rate at which whole channels are dropped before the last layer.
    """

    def __init__(self, channels: Sequence[int], width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.fuse = nn.Sequential(
            nn.Conv2d(width * len(channels), width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classify = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_i, h_i, w_i) → logits (B, K, h_0, w_0)."""
        size = maps[0].shape[-2:]
        projected = [level(each) for level, each in zip(self.levels, maps, strict=True)]
        # Deepest first, as in the released code: published weights have this order.
        same = [F.interpolate(each, size=size, mode="bilinear") for each in reversed(projected[1:])]
        return self.classify(self.dropout(self.fuse(torch.cat([*same, projected[0]], dim=1))))


class Segmenter(nn.Module):
    """A backbone with an `MlpHead`."""

    def __init__(self, backbone: Backbone, width: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = MlpHead(backbone.channels, width, classes, dropout)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W), whose sides the backbone's ``multiple`` divides → logits (B, K, H, W)."""
        logits = self.head(self.backbone(images))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear")


def whole_logits(model: nn.Module, images: Tensor, multiple: int) -> Tensor:
    """Logits (B, K, H, W) of images of any size: padded at the right and bottom with the mean colour, and cut back."""
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % multiple, 0, -height % multiple))
    return model(padded)[..., :height, :width]


def window_logits(model: nn.Module, images: Tensor, window: tuple[int, int]) -> Tensor:
    """Logits (B, K, H, W) from windows of one size, averaged where they overlap.

    Neighbours are at most three quarters of a window apart (768 of 1,024 pixels in STL's evaluation); the last ones end
    at the image's border. An image smaller than the window is padded as in `whole_logits`.
    """
    height, width = images.shape[-2:]
    high, wide = max(window[0], height), max(window[1], width)
    images = F.pad(images, (0, wide - width, 0, high - height))
    total, count = None, images.new_zeros(1, 1, high, wide)
    for top in _starts(high, window[0]):
        for left in _starts(wide, window[1]):
            place = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = model(images[place]).float()
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], high, wide)
            total[place] += logits
            count[place] += 1
    return (total / count)[..., :height, :width]


def _starts(side: int, window: int) -> list[int]:
    step = max(1, window * 3 // 4)
    steps = -(-(side - window) // step)
    return [min(number * step, side - window) for number in range(steps + 1)]


@dataclass(frozen=True)
class SegmenterDescription(Description):
    """What is needed to build a trained segmenter again.

    crop: (H, W) trained on; head_width: C; ignore_id: what pixels without a class had in the masks.
    """

    crop: tuple[int, int]
    head_width: int
    ignore_id: int

    KIND = "segmenter"
    COMMAND = "stl-offline transfer segment"
    BOUNDS: ClassVar = {"crop": (1, _LARGEST_CROP, 2), "head_width": (1, WIDEST, None), "ignore_id": (0, 65_535, None)}

    def build(self) -> Segmenter:
        """The segmenter with random weights."""
        backbone = Backbone(BackboneSpec(self.backbone, self.indices, self.crop))
        return Segmenter(backbone, self.head_width, len(self.class_names))


def load_segmenter(run_or_file: str | Path) -> tuple[Segmenter, SegmenterDescription]:
    """The segmenter that a run trained; as `stl_offline.transfer.description.load_trained`."""
    return load_trained(SegmenterDescription, run_or_file)
