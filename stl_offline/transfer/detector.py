"""torchvision's Faster R-CNN (arXiv 1506.01497) with a feature pyramid (1612.03144) on a backbone's feature maps, and
Mask R-CNN (1703.06870), which adds masks.

B: batch; H, W: image; K: classes, without the background.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from stl_offline.errors import InputError
from stl_offline.transfer.backbone import Backbone, BackboneSpec
from stl_offline.transfer.description import LARGEST_SIDE, WIDEST, Description, load_trained

_ANCHOR = 8  # side of an anchor, in strides of its map: 32 pixels at stride 4
_MASK_CHANNELS = 256


class Pyramid(nn.Module):
    """A backbone's maps with strides that double from map to map, joined by a feature pyramid.

    torchvision assigns boxes to maps by their strides, which so must differ. A map that has the stride of the one
    before it (a FAN's blocks) is max-pooled until it has twice that. Its last row or column of cells may cover less.
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.pools: list[int] = []
        self.strides: list[int] = []
        for stride in backbone.strides:
            wanted = max(stride, 2 * self.strides[-1]) if self.strides else stride
            self.pools.append(wanted // stride)
            self.strides.append(wanted)
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), width, LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → float32 maps (B, width, ⌈H / stride_i⌉, ⌈W / stride_i⌉) by number, and "pool" of the last one:
        torchvision makes anchors, and so boxes, in the precision of the maps."""
        maps = self.backbone(images)
        pooled = [
            each if size == 1 else F.max_pool2d(each, size, ceil_mode=True)
            for each, size in zip(maps, self.pools, strict=True)
        ]
        joined = self.fpn(OrderedDict((str(number), each) for number, each in enumerate(pooled)))
        return OrderedDict((name, each.float()) for name, each in joined.items())


class Anchors(AnchorGenerator):
    """torchvision's anchors, one cell of a map apart: it divides the image's side by the map's, which is more where a
    map's last cells cover less."""

    def __init__(self, strides: list[int]) -> None:
        super().__init__(tuple((_ANCHOR * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides))
        self.strides = strides

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])


class Detector(FasterRCNN):
    """Faster R-CNN on a `Pyramid`, or Mask R-CNN. Takes images (3, H, W) with pixels in [0, 1], and class ids from 1.

    Args:
        backbone: gives the maps.
        classes: K.
        sides: shorter sides that images are scaled to: one is drawn in training, the last is used otherwise.
        longest: longest side of a scaled image, in pixels.
        width: channels of the pyramid.
        masks: predict a mask of each object, too.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: int,
        sides: tuple[int, ...],
        longest: int,
        width: int,
        masks: bool = False,
    ) -> None:
        pyramid = Pyramid(backbone, width)
        # The pooled map behind the last one has twice its stride.
        strides = [*pyramid.strides, 2 * pyramid.strides[-1]]
        super().__init__(
            pyramid,
            num_classes=classes + 1,
            min_size=sides,
            max_size=longest,
            image_mean=list(backbone.mean),
            image_std=list(backbone.std),
            rpn_anchor_generator=Anchors(strides),
            size_divisible=padded_to(backbone),
        )
        self.roi_heads.box_roi_pool = _roi_pool(pyramid.strides, 7)
        if masks:  # as torchvision's MaskRCNN
            self.roi_heads.mask_roi_pool = _roi_pool(pyramid.strides, 14)
            self.roi_heads.mask_head = MaskRCNNHeads(width, (_MASK_CHANNELS,) * 4, 1)
            self.roi_heads.mask_predictor = MaskRCNNPredictor(_MASK_CHANNELS, _MASK_CHANNELS, classes + 1)
        # Boxes take the precision of what is predicted for them: bfloat16 has steps of 2 pixels from 256 on.
        for predictor in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            if predictor is not None:
                predictor.register_forward_hook(_in_float32)


def padded_to(backbone: Backbone) -> int:
    """What the sides of a batch of images are padded to a multiple of: the backbone's, and at least 32."""
    return backbone.multiple * math.ceil(32 / backbone.multiple)


def _in_float32(module: nn.Module, given: Any, found: Any) -> Any:
    """A forward hook: predictions (tensors, or tuples or lists of them) out of mixed precision."""
    if isinstance(found, Tensor):
        return found.float()
    return type(found)(_in_float32(module, given, each) for each in found)


def _roi_pool(strides: list[int], output_size: int) -> MultiScaleRoIAlign:
    """torchvision's pooling of boxes from maps of these strides.

    It takes the strides from the first images that it sees, as powers of two, and keeps them: those of flat ones, which
    are padded, come out wrong, and so does a stride of 14.
    """
    pool = MultiScaleRoIAlign([str(number) for number in range(len(strides))], output_size, sampling_ratio=2)
    side = 32 * strides[-1]
    maps = [torch.zeros(1, 1, side // stride, side // stride, device="cpu") for stride in strides]
    # With these it sets up which map a box of some size is taken from.
    pool(dict(zip(pool.featmap_names, maps, strict=True)), [torch.zeros(0, 4, device="cpu")], [(side, side)])
    pool.scales = [1 / stride for stride in strides]
    return pool


@dataclass(frozen=True)
class DetectorDescription(Description):
    """What is needed to build a trained detector again.

    side, longest: of scaled images, in pixels; head_width: channels of the pyramid; masks: whether it predicts masks.
    """

    side: int
    longest: int
    head_width: int
    masks: bool = False

    KIND = "detector"
    COMMAND = "stl-offline transfer detect"
    BOUNDS: ClassVar = dict.fromkeys(("side", "longest"), (1, LARGEST_SIDE, None)) | {"head_width": (1, WIDEST, None)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.masks, bool):
            raise InputError(f"masks must be true or false, got {self.masks!r:.40}")

    def build(self) -> Detector:
        """The detector with random weights."""
        backbone = Backbone(BackboneSpec(self.backbone, self.indices, (self.side, self.side)))
        return Detector(backbone, len(self.class_names), (self.side,), self.longest, self.head_width, self.masks)


def load_detector(run_or_file: str | Path) -> tuple[Detector, DetectorDescription]:
    """The detector that a run trained; as `stl_offline.transfer.description.load_trained`."""
    return load_trained(DetectorDescription, run_or_file)
