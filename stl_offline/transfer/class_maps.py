"""Feature maps of a FAN as the released segmentation code takes them: the last map lies behind the class attention.

B: batch; N = H·W: tokens of the last stride; C: channels.
"""

from collections.abc import Sequence

import torch
from timm.models import FeatureInfo
from torch import nn

from stl_offline.models import VARIANTS, Fan


def class_map_index(name: str) -> int:
    """The index of the map behind the class attention: one after a FAN's last block."""
    variant = VARIANTS[name.removesuffix("_token")]
    return len(variant.get("hybrid_depths") or ()) + int(variant["depth"])


def has_class_map(name: str, indices: Sequence[int]) -> bool:
    """Whether the last index is `class_map_index`. Always false for models that are no FAN."""
    return name.removesuffix("_token") in VARIANTS and indices[-1] == class_map_index(name)


class ClassAttentionMaps(nn.Module):
    """A FAN's maps, the last of them the tokens behind the class attention, without the final norm.

    The attention updates the class token alone, but each of its blocks also normalises the tokens and adds them to what
    came in. Published segmentation weights were trained with this map.

    Args:
        model: the FAN; its final norm is removed.
        indices: of its maps; the last is `class_map_index`.
    """

    def __init__(self, model: Fan, indices: Sequence[int]) -> None:
        super().__init__()
        model.norm = nn.Identity()
        self.model, self.indices = model, list(indices)
        self.feature_info = FeatureInfo([*model.feature_info, model.feature_info[-1]], tuple(indices))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, height, width) → maps (B, C_i, H_i, W_i)."""
        found, maps = self.model.forward_intermediates(images, indices=self.indices[:-1])
        grid = self.model.grid_size(*images.shape[-2:])
        tokens_BCN = found[:, self.model.num_prefix_tokens :].transpose(1, 2)
        return [*maps, tokens_BCN.unflatten(2, grid)]
