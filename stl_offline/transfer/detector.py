"""torchvision's Faster R-CNN (arXiv 1506.01497) with a feature pyramid (1612.03144) on a backbone's feature maps.

B: batch; H, W: image; K: classes, without the background.
"""

import dataclasses
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from stl_offline.errors import FormatError, InputError
from stl_offline.models import check_digest, load_checkpoint, read_header, weights_path
from stl_offline.transfer.backbone import Backbone, BackboneSpec

KIND = "detector"
_ANCHOR = 8  # side of an anchor, in strides of its map: 32 pixels at stride 4


class Pyramid(nn.Module):
    """A backbone's maps with strides that double from map to map, joined by a feature pyramid.

    torchvision assigns boxes to maps by their strides, which so must differ. A map that has the stride of the one
    before it (a FAN's blocks) is max-pooled until it has twice that.
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
        """(B, 3, H, W) → maps (B, width, H / stride_i, W / stride_i) by number, and "pool" of the last one."""
        maps = self.backbone(images)
        pooled = [each if size == 1 else F.max_pool2d(each, size) for each, size in zip(maps, self.pools, strict=True)]
        return self.fpn(OrderedDict((str(number), each) for number, each in enumerate(pooled)))


class Detector(FasterRCNN):
    """Faster R-CNN on a `Pyramid`. Takes images (3, H, W) with pixels in [0, 1], and class ids from 1.

    Args:
        backbone: gives the maps.
        classes: K.
        sides: shorter sides that images are scaled to: one is drawn in training, the last is used otherwise.
        longest: longest side of a scaled image, in pixels.
        width: channels of the pyramid.
    """

    def __init__(self, backbone: Backbone, classes: int, sides: tuple[int, ...], longest: int, width: int) -> None:
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
            rpn_anchor_generator=AnchorGenerator(
                tuple((_ANCHOR * stride,) for stride in strides), ((0.5, 1.0, 2.0),) * len(strides)
            ),
            size_divisible=max(32, backbone.multiple),
        )


@dataclass(frozen=True)
class DetectorDescription:
    """What is needed to build a trained detector again.

    backbone: a name in timm's registry; indices: its feature maps; class_names: K; side, longest: of scaled images;
    head_width: channels of the pyramid.

    Raises:
        InputError: a value that no detector has.
    """

    backbone: str
    indices: tuple[int, ...]
    class_names: tuple[str, ...]
    side: int
    longest: int
    head_width: int
    kind: str = KIND
    version: int = 1

    def __post_init__(self) -> None:
        for name in ("indices", "class_names"):
            if not isinstance(getattr(self, name), list | tuple):
                raise InputError(f"{name} must be a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.kind != KIND or self.version != 1:
            raise InputError(f"it must be a {KIND} of version 1, got {self.kind!r:.40} of version {self.version!r:.40}")
        if not isinstance(self.backbone, str) or not all(isinstance(each, str) for each in self.class_names):
            raise InputError("backbone must be a name in timm's registry, class_names a list of names")
        numbers = (*self.indices, self.side, self.longest, self.head_width)
        if not self.class_names or any(type(each) is not int or not 0 <= each <= 1 << 16 for each in numbers):
            raise InputError("there must be classes, and sizes and indices must be whole numbers up to 65,536")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str, where: str) -> "DetectorDescription":
        """The inverse of `to_json`; ``where`` is the file, for messages. Raises `FormatError`."""
        try:
            values: Any = json.loads(text)
            if not isinstance(values, dict) or values.get("kind") != KIND:
                raise InputError("it describes another kind of model; `stl-offline transfer detect` trains detectors")
            return cls(**values)
        except (TypeError, ValueError, RecursionError) as error:
            raise FormatError(f"{where} holds no detector that can be used ({error})") from error

    def build(self) -> Detector:
        """The detector with random weights."""
        backbone = Backbone(BackboneSpec(self.backbone, self.indices, (self.side, self.side)))
        return Detector(backbone, len(self.class_names), (self.side,), self.longest, self.head_width)


def load_detector(run_or_file: str | Path) -> tuple[Detector, DetectorDescription]:
    """Build the detector that a run trained and load its weights.

    Raises:
        InputError: nothing is there.
        FormatError: the file is damaged, or describes no detector.
    """
    path = weights_path(run_or_file)
    description = DetectorDescription.from_json(read_header(path), str(path))
    model = description.build()
    check_digest(path)
    load_checkpoint(model, path)
    return model.eval(), description
