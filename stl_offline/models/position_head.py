"""The head of any timm classifier, applied at every position of its last feature map.

Shape letters: B batch, Gh × Gw grid of the last feature map, N = Gh·Gw, P prefix tokens (class, registers), C features,
K classes.

A head pools the map to one vector and classifies that. Giving it maps of a single position therefore classifies each
position, for any layout and without knowing the head's parts. That is a labeling only where the class logits come from
such a vector, and where what follows the pooling is linear after at most one normalisation; numbers tell both.
"""

import torch
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.input_size import InputSizeError

_MEAN_POOLS = ("avg", "fast", "fastavg", "token", "cls", "")
_CHECK_TOLERANCE = 1e-3  # of the largest logit; float32 agrees to about 1e-6, another pooling differs by about 1


class PositionHead(nn.Module):
    """Features of `model.forward_features` → (class logits (B, K), position logits (B, N, K)).

    Works for ViT-like models (with or without class and register tokens), ConvNets, hybrids and NHWC models. The model
    is not registered as a submodule; the caller owns it.

    Args:
        model: timm classifier in evaluation mode; the modules that its `forward_head` runs are put into float32.
        size: (height, width) in pixels of the random image on which the head is checked.
        name: for messages.

    Attributes:
        pooling: what the class logits are computed from, "mean" (then, with a linear head, the mean of the position
            logits equals the class logits) or "class token" (for which there is no such identity).
        linear: whether the head is affine without a normalisation after the pooling.

    Raises:
        InputError: attention, max or mixed pooling, two heads, a non-linear layer after the pooling, or features that
            are not one map.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], name: str):
        super().__init__()
        self._model = [model]  # in a list, so that the model's parameters don't count twice
        self._name = name
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self._refuse_known(model)
        self._layout = "NHWC" if str(getattr(model, "output_fmt", "")).upper().endswith("NHWC") else "NCHW"
        with torch.inference_mode():
            self.prefix = 0
            features = self._probe(size)
            self._tokens = features.ndim == 3
            self._to_float32(features)
            self.pooling, self.linear = self._check(features.float())

    def _refuse_known(self, model: nn.Module) -> None:
        if not hasattr(model, "forward_features") or not hasattr(model, "forward_head"):
            self._refuse("it has no forward_features and forward_head as timm's models have")
        if getattr(model, "attn_pool", None) is not None or getattr(model, "global_pool", None) == "map":
            self._refuse("it pools by attention, so no position has logits of its own")
        if hasattr(model, "head_dist"):
            self._refuse("it has two heads (class and distillation token)")
        for module in (model, getattr(model, "head", None)):
            pool = getattr(module, "global_pool", None)
            kind = pool if isinstance(pool, str) else getattr(pool, "pool_type", "")
            if kind not in _MEAN_POOLS:
                self._refuse(f"it pools by {kind!r}; only a mean over positions or a class token can be undone")

    def _refuse(self, reason: str) -> None:
        raise InputError(f"{self._name} cannot label tokens: {reason}; take another classifier as labeler")

    def _probe(self, size: tuple[int, int]) -> torch.Tensor:
        """Features of two random images, of a private generator; notes the number of prefix tokens."""
        model = self._model[0]
        parameter = next(model.parameters())
        channels = getattr(model, "in_chans", 3)
        noise = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        features = self._features(noise.to(parameter.device, parameter.dtype))
        if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
            kind = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            self._refuse(f"its forward_features gives {kind}, not one feature map")
        if features.ndim == 3:
            declared = getattr(model, "num_prefix_tokens", None)
            for prefix in (0, 1) if declared is None else (declared,):
                self.prefix = prefix
                if _grid_of(features.shape[1] - prefix, *size) is not None:
                    break
        return features

    def _features(self, images: torch.Tensor):
        try:
            return self._model[0].forward_features(images)
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError) as error:
            height, width = images.shape[-2:]
            first = str(error).strip().split("\n", 1)[0]
            raise InputSizeError(f"{self._name} cannot take images of {height}×{width} pixels: {first}") from error

    def _to_float32(self, features: torch.Tensor) -> None:
        """Put every module that the head runs into float32."""
        ran: list[nn.Module] = []
        hooks = [
            module.register_forward_pre_hook(lambda module, _: ran.append(module))
            for module in self._model[0].modules()
            if not list(module.children())
        ]
        self._model[0].forward_head(features)
        for hook in hooks:
            hook.remove()
        for module in ran:
            module.float()

    def _check(self, features: torch.Tensor) -> tuple[str, bool]:
        """What the head pools, and whether it is linear after that; `InputError` where neither is as needed."""
        logits, by_position = self(features)
        scale = logits.abs().max().clamp(min=1e-12) * _CHECK_TOLERANCE
        vectors = self.vectors(features)
        width = vectors.shape[-1]
        if not self._normalised_affine(width, features.device):
            self._refuse("its head is not linear after the pooling (a hidden layer with an activation)")

        linear = bool((by_position.mean(dim=1) - logits).abs().max() <= scale)
        pooled = {"mean": vectors.mean(dim=1)}
        if self._tokens and self.prefix:
            pooled["class token"] = features[:, 0]
            pooled["mean with prefix"] = features.mean(dim=1)
        for pooling, vector in pooled.items():
            if (self._classify(vector) - logits).abs().max() <= scale:
                return pooling, linear and pooling == "mean"
        self._refuse("its class logits are those of neither the mean position nor the class token (attention pooling?)")

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

    def vectors(self, features: torch.Tensor) -> torch.Tensor:
        """Features → positions in row order, (B, N, C)."""
        if self._tokens:
            return features[:, self.prefix :]
        if self._layout == "NCHW":
            return features.flatten(2).transpose(1, 2)
        return features.flatten(1, 2)

    def _classify(self, vectors: torch.Tensor) -> torch.Tensor:
        """Apply the head to single positions: (M, C) → (M, K)."""
        if self._tokens:
            # A class-token head reads position 0, a mean head the positions after the prefix: the same vector in all.
            single = vectors[:, None, :].expand(-1, self.prefix + 1, -1)
        elif self._layout == "NHWC":
            single = vectors[:, None, None, :]
        else:
            single = vectors[:, :, None, None]
        return self._model[0].forward_head(single)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 features as `model.forward_features` gives them → class logits (B, K), position logits (B, N, K)."""
        vectors = self.vectors(features)
        logits = self._classify(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
        return self._model[0].forward_head(features), logits

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(Gh, Gw) of the last feature map for images of height × width pixels; found by running one, then kept."""
        if (height, width) not in self._grids:
            model = self._model[0]
            parameter = next(model.parameters())
            with torch.inference_mode():
                blank = torch.zeros(1, getattr(model, "in_chans", 3), height, width)
                features = self._features(blank.to(parameter.device, parameter.dtype))
            if features.ndim == 4:
                grid = tuple(features.shape[2:] if self._layout == "NCHW" else features.shape[1:3])
            else:
                grid = _grid_of(features.shape[1] - self.prefix, height, width)
            if grid is None:
                raise InputSizeError(
                    f"{self._name}: {features.shape[1]} tokens form no grid for {height}×{width} pixels"
                )
            self._grids[height, width] = (int(grid[0]), int(grid[1]))
        return self._grids[height, width]


def _grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid with this many cells whose cells are nearest to squares, or None where none has the image's shape."""
    rows = round((tokens * height / width) ** 0.5)
    for candidate in (rows, rows - 1, rows + 1):
        if candidate > 0 and tokens % candidate == 0:
            columns = tokens // candidate
            cell_ratio = (height / candidate) / (width / columns)
            if 0.8 < cell_ratio < 1.25:
                return candidate, columns
    return None
