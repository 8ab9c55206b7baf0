"""Any classifier as a token labeler: images → (class logits, token logits on its grid).

Shape letters: B batch, N = Gh·Gw positions of the token grid, K classes.
"""

from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.fan import Fan
from stl_offline.models.inference import inference_form
from stl_offline.models.input_size import InputSizeError, cell_size, uncovered
from stl_offline.models.position_head import PositionHead
from stl_offline.models.token_model import TokenModel


class TokenLabeler(nn.Module):
    """Frozen labeler: normalised images → class logits (B, K) and token logits (B, N, K), both float32.

    A FAN with a token head gives its own token logits, through a copy in inference form (load its weights first), and
    a `TokenModel` its own, too. Of any other timm classifier the head is applied at every position of the last
    feature map, which is a `TokenModel` with a shared head.
    The heads and everything after them run in float32, under autocast too.

    Args:
        model: a FAN `_token` model, a `TokenModel`, or a timm classifier. What is no FAN is frozen; a head that is
            applied per position is put into float32.
        name: how label sets call it; default: the model's architecture.
        mean, std: of the images' normalisation, three numbers each, for values in [0, 1]; default: the model's.
        img_size: side or (height, width) of the images, in pixels; default: the model's own input size. The model must
            see all of such an image.
        class_names: K names; weights_sha256: SHA-256 of the weights; interpolation: how the images that the model was
            trained on were resized. Label sets record them.

    Attributes:
        num_classes, name, mean, std, class_names, weights_sha256, interpolation: as above; img_size: (height, width).

    Raises:
        InputError: the model's head cannot be applied per position (the message names the reason), the model cannot
            take images of this size or does not see all of them, or there are not K class names.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        img_size: int | tuple[int, int] | None = None,
        class_names: Sequence[str] | None = None,
        weights_sha256: str = "",
        interpolation: str = "area",
    ) -> None:
        super().__init__()
        cfg = getattr(model, "pretrained_cfg", None) or {}
        self.name = name or cfg.get("architecture") or type(model).__name__
        self.mean = tuple(mean or cfg.get("mean") or IMAGENET_DEFAULT_MEAN)
        self.std = tuple(std or cfg.get("std") or IMAGENET_DEFAULT_STD)
        self.num_classes = int(getattr(model, "num_classes", 0))
        if self.num_classes < 1:
            raise InputError(f"{self.name} has no classifier (num_classes is {self.num_classes}): it cannot label")
        self.class_names = None if class_names is None else tuple(class_names)
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.name} has {self.num_classes} classes, but {len(self.class_names)} class names are given"
            )
        self.weights_sha256 = weights_sha256
        self.interpolation = interpolation
        size = img_size or tuple(cfg.get("input_size") or (3, 224, 224))[-2:]
        self.img_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        cell = cell_size(model)
        if isinstance(model, Fan) and model.token_head:
            self.model = inference_form(model)
        else:
            if not isinstance(model, TokenModel):
                refusal = ("cannot label tokens", "take another classifier")
                model = TokenModel(model, token_head="shared", img_size=self.img_size, name=self.name, refusal=refusal)
            self.model = model.requires_grad_(False)
        self.eval()
        self._check_view(cell)

    @property
    def positions(self) -> PositionHead | None:
        """The class head that is applied at every position; None for a model with a token head."""
        return getattr(self.model, "positions", None)

    @property
    def pooling(self) -> str:
        """Where token logits come from: "token head"; else what the class head sees: "mean", "mean with prefix" (of
        all tokens) or "class token"."""
        return getattr(self.model, "pooling", "token head")

    def _check_view(self, cell: int | None) -> None:
        """Raise `InputSizeError` unless the token grid sees the whole image."""
        height, width = self.img_size
        if isinstance(self.model, TokenModel):
            self.model.check_view(height, width)
            return
        # A FAN's stem refuses what it does not see.
        if fault := uncovered(self.img_size, self.grid_size(height, width), cell):
            raise InputSizeError(f"{self.name} does not see all of an image of {height}×{width} pixels: {fault}")

    def train(self, mode: bool = True) -> "TokenLabeler":
        """A labeler stays in evaluation mode, also inside a model that is trained."""
        return super().train(False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (Gh, Gw) for images of height × width pixels; `InputError` where the model can't take them."""
        return self.model.grid_size(height, width)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (B, 3, height, width) → class logits (B, K), token logits (B, N, K), float32."""
        return self.model(images)
