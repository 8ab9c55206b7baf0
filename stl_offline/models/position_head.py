"""The head of any timm classifier, applied at every position of its last feature map.

Shape letters: B batch, Gh × Gw grid of the last feature map, N = Gh·Gw, P prefix tokens (class, registers), C features,
K classes.

A head pools the map to one vector and classifies that. Giving it maps of a single position therefore classifies each
position, for any layout and without knowing the head's parts. That is a labeling only where the class logits come from
such a vector, and where what follows the pooling is linear after at most one normalisation; numbers tell both.
"""

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import nn

from stl_offline.models.feature_map import FeatureMap
from stl_offline.models.layers import evaluating

_MEAN_POOLS = ("avg", "fast", "fastavg", "token", "cls", "")
_CHECK_TOLERANCE = 1e-3  # of the largest logit; float32 agrees to about 1e-6, another pooling differs by about 1


def why_not_per_position(model: nn.Module) -> str:
    """What, in a model's declarations, keeps its head from being applied per position; "" where nothing does."""
    if getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", None) == "map":
        return "it pools by attention, so no position has logits of its own"
    if hasattr(model, "head_dist"):
        return "it has two heads (class and distillation token)"
    for module in (model, getattr(model, "head", None)):
        pool = getattr(module, "global_pool", None)
        kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")
        if kind not in _MEAN_POOLS:
            return f"it pools by {kind!r}; only a mean over positions or a class token can be undone"
    return ""


def float32_head(model: nn.Module, features: torch.Tensor) -> list[nn.Module]:
    """Put every module with weights that ``model.forward_head`` runs on ``features`` into float32; gives them."""
    ran: list[nn.Module] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
        for module in model.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        with evaluating(model):
            model.forward_head(features)
    finally:
        for hook in hooks:
            hook.remove()
    for module in ran:
        module.float()
    return ran


class PositionHead(nn.Module):
    """Features of `model.forward_features` → (class logits (B, K), position logits (B, N, K)).

    Works for ViT-like models (with or without class and register tokens), ConvNets, hybrids and NHWC models. The model
    is not registered as a submodule; the caller owns it.

    Args:
        model: timm classifier; the modules that its `forward_head` runs are put into float32.
        layout: of the model's features.
        refuse: raises, with a reason in its only argument, where the head cannot be applied per position.

    Attributes:
        pooling: what the class logits are computed from, "mean" (then, with a linear head, the mean of the position
            logits equals the class logits), "mean with prefix" or "class token" (no such identity).
        linear: whether the head is affine without a normalisation after the pooling.
        modules_of_head: the modules that were put into float32.
        has_batch_norm: whether the head has one, whose statistics over positions are not those over images.

    Raises:
        InputError: attention, max or mixed pooling, two heads, or a non-linear layer after the pooling.
    """

    def __init__(self, model: nn.Module, layout: FeatureMap, refuse: Callable[[str], NoReturn]):
        super().__init__()
        self._model = [model]  # in a list, so that the model's parameters don't count twice
        self._layout = layout
        if reason := why_not_per_position(model):
            refuse(reason)
        self.modules_of_head = float32_head(model, layout.features)
        self.has_batch_norm = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in self.modules_of_head)
        with evaluating(model):
            self.pooling, self.linear = self._check(layout.features.float(), refuse)

    def _check(self, features: torch.Tensor, refuse: Callable[[str], NoReturn]) -> tuple[str, bool]:
        """What the head pools, and whether it is linear after that; refused where neither is as needed."""
        logits, by_position = self(features)
        scale = logits.abs().max().clamp(min=1e-12) * _CHECK_TOLERANCE
        vectors = self._layout.vectors(features)
        if not self._normalised_affine(vectors.shape[-1], features.device):
            refuse("its head is not linear after the pooling (a hidden layer with an activation)")

        linear = bool((by_position.mean(dim=1) - logits).abs().max() <= scale)
        pooled = {"mean": vectors.mean(dim=1)}
        if self._layout.is_sequence and self._layout.prefix:
            pooled["class token"] = features[:, 0]
            pooled["mean with prefix"] = features.mean(dim=1)
        for pooling, vector in pooled.items():
            if (self._classify(vector) - logits).abs().max() <= scale:
                return pooling, linear and pooling == "mean"
        refuse("its class logits are those of neither the mean position nor the class token (attention pooling?)")

    def _normalised_affine(self, width: int, device: torch.device) -> bool:
        """Is the head affine on vectors of mean 0 and variance 1? True for linear heads, also after one normalisation.

        On the circle cos·a + sin·b of two such vectors an affine head traces an ellipse around its centre.
        """
        a, b = torch.randn(2, width, generator=torch.Generator().manual_seed(1)).to(device).double()
        a = a - a.mean()
        a = a / a.std(correction=0)
        b = b - b.mean()
        b = b - (a @ b) / (a @ a) * a
        b = b / b.std(correction=0)
        angles = torch.linspace(0.3, 6.0, 7, device=device, dtype=torch.float64)
        points = torch.stack((a, -a, b, *(angle.cos() * a + angle.sin() * b for angle in angles)))
        values = self._classify(points.float())
        centre = (values[0] + values[1]) / 2
        along_a, along_b = values[0] - centre, values[2] - centre
        expected = angles.cos()[:, None] * along_a + angles.sin()[:, None] * along_b + centre
        return bool((values[3:] - expected).abs().max() <= _CHECK_TOLERANCE * values.abs().max().clamp(min=1e-12))

    def _classify(self, vectors: torch.Tensor) -> torch.Tensor:
        """Apply the head to single positions: (M, C) → (M, K)."""
        return self._model[0].forward_head(self._layout.single(vectors))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 features as `model.forward_features` gives them → class logits (B, K), position logits (B, N, K)."""
        vectors = self._layout.vectors(features)
        logits = self._classify(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        return self._model[0].forward_head(features), logits
