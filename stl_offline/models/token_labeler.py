"""Any classifier as a token labeler: images → (class logits, token logits on its grid).

Shape letters: B batch, N = Gh·Gw positions of the token grid, K classes.
"""

import functools
from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.fan import Fan
from stl_offline.models.inference import inference_form
from stl_offline.models.input_size import InputSizeError, cell_size, uncovered, unseen_sides, with_open_branches
from stl_offline.models.position_head import PositionHead


class TokenLabeler(nn.Module):
    """Frozen labeler: normalised images → class logits (B, K) and token logits (B, N, K), both float32.

    A FAN with a token head gives its own token logits, through a copy in inference form (load its weights first). Of
    any other timm classifier the head is applied at every position of the last feature map; `PositionHead` says
    for which models that is possible, and checks it.
    The heads and everything after them run in float32, under autocast too.

    Args:
        model: a FAN `_token` model, or a timm classifier, which is frozen and whose head is put into float32.
        name: how label sets call it; default: the model's architecture.
        mean, std: of the images' normalisation, three numbers each, for values in [0, 1]; default: the model's.
        img_size: side or (height, width) of the images, in pixels; default: the model's own input size. The model must
            see all of such an image.
        class_names: K names; weights_sha256: SHA-256 of the weights; interpolation: how the images that the model was
            trained on were resized. Label sets record them.

    Attributes:
        num_classes, name, mean, std, class_names, weights_sha256, interpolation: as above; img_size: (height, width).
        pooling: where token logits come from: "token head"; else what the class head sees: "mean", "mean with prefix"
            (of all tokens) or "class token".

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
        self.positions = None
        cell = cell_size(model)
        if isinstance(model, Fan) and model.token_head:
            self.model = inference_form(model)
        else:
            self.model = model.requires_grad_(False).eval()
            self.positions = PositionHead(model, self.img_size, self.name)
        self.pooling = "token head" if self.positions is None else self.positions.pooling
        self.eval()
        self._check_view(cell)

    @torch.inference_mode()
    def _check_view(self, cell: int | None) -> None:
        """Raise `InputSizeError` unless the token grid sees the whole image."""
        height, width = self.img_size
        grid = self.grid_size(height, width)
        fault = uncovered(self.img_size, grid, cell)
        if not fault and self.positions is not None:  # a FAN's stem refuses what it does not see
            parameter = next(self.model.parameters())
            image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(2))
            image = image.to(parameter.device, parameter.dtype)
            sides = unseen_sides(self._tokens, image)
            if sides:
                sides = unseen_sides(functools.partial(self._tokens, model=with_open_branches(self.model)), image)
            if sides:
                fault = f"pixels at the {' and '.join(sides)} change none of its {grid[0]}×{grid[1]} tokens"
        if fault:
            raise InputSizeError(f"{self.name} does not see all of an image of {height}×{width} pixels: {fault}")

    def _tokens(self, images: torch.Tensor, model: nn.Module | None = None) -> torch.Tensor:
        """What the head classifies: features of the positions, (B, N, C)."""
        return self.positions.vectors((model or self.model).forward_features(images))

    def train(self, mode: bool = True) -> "TokenLabeler":
        """A labeler stays in evaluation mode, also inside a model that is trained."""
        return super().train(False)

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (Gh, Gw) for images of height × width pixels; `InputError` where the model can't take them."""
        return (self.positions or self.model).grid_size(height, width)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised images (B, 3, height, width) → class logits (B, K), token logits (B, N, K), float32."""
        if self.positions is None:
            return self.model(images)
        features = self.model.forward_features(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.positions(features.float())
