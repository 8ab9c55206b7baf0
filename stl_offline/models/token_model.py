"""Any timm classifier as a token model: images → (class logits, token logits), as a FAN with a token head gives them.

Shape letters: B batch, Gh × Gw grid of the last feature map, N = Gh·Gw tokens, C features, K classes.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from timm.layers import trunc_normal_
from timm.models import group_parameters
from timm.optim import auto_group_layers
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.feature_map import FeatureMap, in_channels
from stl_offline.models.input_size import InputSizeError, cell_size, uncovered, unseen_sides, with_open_branches
from stl_offline.models.layers import FullPrecisionLinear, evaluating, fix_statistics_in_recomputation
from stl_offline.models.position_head import PositionHead, float32_head

TRUNK, TOKEN_HEAD = "trunk.", "token_head."
_REFUSALS = {
    "own": ("cannot have a token head", "take another classifier"),
    "shared": ("cannot share its class head with its tokens", 'use `token_head="own"`'),
}


class TokenHead(nn.Sequential):
    """Layer norm and linear map of each token, (B, N, C) → (B, N, K), in float32.

    Some families normalise their last feature map and others do so after pooling it, in the class head. The layer norm
    makes them alike.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        linear = FullPrecisionLinear(width, num_classes)
        trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        super().__init__(nn.LayerNorm(width), linear)


class TokenModel(nn.Module):
    """A timm classifier with a token head on its last feature map, at that map's grid (7×7 for stride 32 at 224 px).

    Args:
        trunk: the classifier, with its class head.
        token_head: "own", a `TokenHead` with weights of its own; or "shared", the class head applied at every position
            (`PositionHead` states for which models that is possible).
        img_size: side or (height, width) of the images, in pixels; default: what the model is configured for.
        name: for messages; default: the model's architecture.
        refusal: what a model that is refused cannot do, and what to do then, for messages.

    Attributes:
        trunk, num_classes, name; positions: the `PositionHead` of a shared head, else None; pooling: "token head", or
        `PositionHead.pooling`.

    Raises:
        InputError: the model has no classifier, gives no single feature map, or its head cannot be shared.
        InputSizeError: it cannot take images of this size, or the token grid does not cover them.
    """

    def __init__(
        self,
        trunk: nn.Module,
        *,
        token_head: str = "own",
        img_size: int | tuple[int, int] | None = None,
        name: str | None = None,
        refusal: tuple[str, str] | None = None,
    ) -> None:
        super().__init__()
        cfg = getattr(trunk, "pretrained_cfg", None) or {}
        self.name = name or cfg.get("architecture") or type(trunk).__name__
        self.num_classes = int(getattr(trunk, "num_classes", 0))
        refuse = functools.partial(_refuse, self.name, refusal or _REFUSALS[token_head])
        if self.num_classes < 1:
            refuse(f"it has no classifier (num_classes is {self.num_classes})")
        if not hasattr(trunk, "forward_features") or not hasattr(trunk, "forward_head"):
            refuse("it has no forward_features and forward_head as timm's models have")
        size = img_size or tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.trunk = trunk
        self._layout = FeatureMap(trunk, size, self.name, refuse)
        self.positions = None
        if token_head == "own":
            self.token_head = TokenHead(self._layout.width, self.num_classes)
            self._heads = [*float32_head(trunk, self._layout.features), self.token_head]
        else:
            self.positions = PositionHead(trunk, self._layout, refuse)
            self._heads = self.positions.modules_of_head
        del self._layout.features
        self.pooling = "token head" if self.positions is None else self.positions.pooling
        self._check_covered(size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "TokenModel":
        """As torch has it, for `half`, `double` and their kin; the heads stay in float32."""
        super()._apply(fn, recurse)
        for head in self._heads:
            head.float()
        return self

    def _check_covered(self, size: tuple[int, int]) -> None:
        grid = self.grid_size(*size)
        if fault := uncovered(size, grid, cell_size(self.trunk)):
            raise _unseen(self.name, size, fault)

    def check_view(self, height: int, width: int) -> None:
        """Check that the tokens see the whole of such an image; runs a few of them, in evaluation mode.

        Raises:
            InputSizeError: pixels at a side change no token, or the grid does not cover the image.
        """
        self._check_covered((height, width))
        parameter = next(self.trunk.parameters())
        image = torch.randn(1, in_channels(self.trunk), height, width, generator=torch.Generator().manual_seed(2))
        image = image.to(parameter.device, parameter.dtype)
        with evaluating(self.trunk):
            sides = unseen_sides(self._vectors_of(self.trunk), image)
            if sides:
                opened = with_open_branches(self.trunk)
                sides = unseen_sides(self._vectors_of(opened), image)
                if sides:
                    # Little of an image may be left in the features of a deep untrained model: float64 still shows it.
                    with contextlib.suppress(RuntimeError):  # a model that computes in float32 whatever its weights are
                        sides = unseen_sides(self._vectors_of(opened.double()), image.double())
        if sides:
            grid = self.grid_size(height, width)
            fault = f"pixels at the {' and '.join(sides)} change none of its {grid[0]}×{grid[1]} tokens"
            raise _unseen(self.name, (height, width), fault)

    def _vectors_of(self, trunk: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda images: self._layout.vectors(trunk.forward_features(images))

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's configuration of the trunk."""
        return self.trunk.pretrained_cfg

    @property
    def feature_info(self) -> Any:
        """timm's description of the trunk's feature maps; None where it has none."""
        return getattr(self.trunk, "feature_info", None)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (Gh, Gw) for images of height × width pixels.

        Raises:
            InputSizeError: the model cannot take them.
        """
        return self._layout.grid_size(height, width)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Prepare a trunk of fixed input size (ViT, Swin) for another side or (height, width); others need nothing."""
        if hasattr(self.trunk, "set_input_size"):
            self.trunk.set_input_size(img_size=img_size)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations of the trunk's layers in the backward pass, as its family does.

        Raises:
            InputError: the trunk's family has no gradient checkpointing.
        """
        try:
            self.trunk.set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise InputError(f"{self.name} has no gradient checkpointing; set `grad_checkpointing` to False") from error
        fix_statistics_in_recomputation(self.trunk)

    @torch.jit.ignore
    def get_classifier(self) -> tuple[nn.Module, ...]:
        """The class head and, where it has weights of its own, the token head."""
        head = self.trunk.get_classifier()
        heads = tuple(head) if isinstance(head, tuple | list) else (head,)
        return (*heads, self.token_head) if self.positions is None else heads

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that weight decay skips besides 1-D parameters, as the trunk lists them."""
        listed = getattr(self.trunk, "no_weight_decay", set)()
        return {f"{TRUNK}{name}" for name in listed}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """A parameter's layer for layer-wise learning rate decay, as the trunk's family numbers them.

        The token head belongs to the last layer, as the class head does.
        """
        if hasattr(self.trunk, "group_matcher"):
            layers = group_parameters(self.trunk, self.trunk.group_matcher(coarse=coarse), reverse=True)
        else:
            layers = auto_group_layers(self.trunk)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix(TRUNK), last)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (B, 3, height, width) → class logits (B, K), token logits (B, N, K).

        The heads and everything after them run in float32, under autocast too.
        """
        features = self.trunk.forward_features(images)
        with torch.autocast(images.device.type, enabled=False):
            features = features.float()
            if self.positions is not None:
                return self.positions(features)
            return self.trunk.forward_head(features), self.token_head(self._layout.vectors(features))


def _refuse(name: str, refusal: tuple[str, str], reason: str) -> NoReturn:
    cannot, advice = refusal
    raise InputError(f"{name} {cannot}: {reason}; {advice}")


def _unseen(name: str, size: tuple[int, int], fault: str) -> InputSizeError:
    return InputSizeError(f"{name} does not see all of an image of {size[0]}×{size[1]} pixels: {fault}")
