"""A backbone as an encoder of segmentation_models_pytorch, whose decoders want maps at strides 2, 4, 8, 16 and 32.

B: batch; H, W: image.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from stl_offline.errors import InputError
from stl_offline.transfer.backbone import Backbone

_STRIDES = (4, 8, 16, 32)


class PyramidEncoder(nn.Module):
    """Four maps of a backbone, brought to the strides 4, 8, 16 and 32.

    A map of a finer stride is max-pooled, one of a coarser stride is resized bilinearly: a FAN hybrid's strides 4, 8,
    16, 16 need one pooling, and a plain transformer's 16, 16, 16, 16 become a simple feature pyramid (as in arXiv
    2203.16527, without its learned layers). There is no map of stride 2: it has no channels, as with the package's own
    transformer encoders.

    Args:
        backbone: gives four maps; `stl_offline.load_backbone`.
        depth, output_stride: what segmentation_models_pytorch passes; only 5 and 32.

    Raises:
        InputError: another number of maps, ``depth`` or ``output_stride``.
    """

    def __init__(self, backbone: Backbone, depth: int = 5, output_stride: int = 32) -> None:
        super().__init__()
        if len(backbone.channels) != len(_STRIDES):
            raise InputError(f"{backbone.spec.model} gives {len(backbone.channels)} maps, and 4 are needed")
        if (depth, output_stride) != (5, 32):
            raise InputError(
                f"there are five levels up to stride 32, got a depth of {depth} and an output stride of {output_stride}"
            )
        self.backbone = backbone
        self.name, self.output_stride = backbone.spec.model, output_stride
        self.out_channels = [3, 0, *backbone.channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised images (B, 3, H, W), H and W multiples of 32 → the images, an empty map, and the four maps."""
        height, width = images.shape[-2:]
        found = [images, images.new_empty(len(images), 0, height // 2, width // 2)]
        for each, stride in zip(self.backbone(images), _STRIDES, strict=True):
            size = (height // stride, width // stride)
            if each.shape[-1] >= size[1]:
                found.append(F.max_pool2d(each, each.shape[-1] // size[1]))
            else:
                found.append(F.interpolate(each, size=size, mode="bilinear"))
        return found

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Called by segmentation_models_pytorch: a backbone takes RGB images alone."""
        if in_channels != 3:
            raise InputError(f"images have 3 channels here, got {in_channels}")
