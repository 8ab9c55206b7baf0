"""The last feature map of any timm model: where its positions lie in what `forward_features` gives.

Shape letters: B batch, Gh × Gw grid of the map, N = Gh·Gw positions, P prefix tokens (class, registers), C features.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from stl_offline.models.input_size import InputSizeError
from stl_offline.models.layers import evaluating

# Grids of tokens are found from their number; a grid fits where its cells are no longer than this times their width.
_LONGEST_CELL = 1.25


class FeatureMap:
    """Layout of a model's last feature map: (B, P + N, C), (B, C, Gh, Gw) or (B, Gh, Gw, C).

    The model is run once, on a random image of a private generator, in evaluation mode.

    Args:
        model: timm model; stays with the caller.
        size: (height, width) in pixels of the image.
        name: for messages.
        refuse: raises, with a reason in its only argument, where the features are not one map.

    Attributes:
        width: C; prefix: P; is_sequence: whether features are (B, P + N, C); features: those of the random image.

    Raises:
        InputSizeError: the model cannot take images of this size, or its tokens form no grid.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], name: str, refuse: Callable[[str], NoReturn]) -> None:
        self._model, self._name = model, name
        self._is_nhwc = str(getattr(model, "output_fmt", "")).upper().endswith("NHWC")
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}
        self.prefix = 0
        noise = torch.randn(
            (2, in_channels(model), *size), generator=torch.Generator("cpu").manual_seed(0), device="cpu"
        )
        features = self._run(noise)
        if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
            kind = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            refuse(f"its forward_features gives {kind}, not one feature map")
        self.is_sequence = features.ndim == 3
        self.width = features.shape[1 if features.ndim == 4 and not self._is_nhwc else -1]
        if self.is_sequence:
            declared = getattr(model, "num_prefix_tokens", None)
            for self.prefix in (0, 1) if declared is None else (declared,):
                if _grid_of(features.shape[1] - self.prefix, *size) is not None:
                    break
        self.features = features

    def _run(self, images: torch.Tensor) -> Any:
        model = self._model
        parameter = next(model.parameters())
        try:
            # Not inference mode: what a model computes once and keeps must be good for training, too.
            with evaluating(model):
                return model.forward_features(images.to(parameter.device, parameter.dtype))
        except (ArithmeticError, AssertionError, IndexError, RuntimeError, ValueError) as error:
            height, width = images.shape[-2:]
            first = str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__
            raise InputSizeError(f"{self._name} cannot take images of {height}×{width} pixels: {first}") from error

    def vectors(self, features: torch.Tensor) -> torch.Tensor:
        """Features → positions in row order, (B, N, C)."""
        if self.is_sequence:
            return features[:, self.prefix :]
        return features.flatten(1, 2) if self._is_nhwc else features.flatten(2).transpose(1, 2)

    def single(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors (M, C) → M maps of a single position each, as the model's head takes them."""
        if self.is_sequence:
            # A class-token head reads position 0, a mean head the positions after the prefix: the same vector in all.
            return vectors[:, None, :].expand(-1, self.prefix + 1, -1)
        return vectors[:, None, None, :] if self._is_nhwc else vectors[:, :, None, None]

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """(Gh, Gw) for images of height × width pixels; found by running one, then kept.

        Raises:
            InputSizeError: the model cannot take them, or its tokens form no grid.
        """
        if (height, width) not in self._grids:
            features = self._run(torch.zeros(1, in_channels(self._model), height, width, device="cpu"))
            if features.ndim == 4:
                grid = tuple(features.shape[1:3] if self._is_nhwc else features.shape[2:])
            else:
                grid = _grid_of(features.shape[1] - self.prefix, height, width)
            if grid is None:
                raise InputSizeError(
                    f"{self._name}: {features.shape[1]} tokens form no grid for {height}×{width} pixels"
                )
            self._grids[height, width] = (int(grid[0]), int(grid[1]))
        return self._grids[height, width]


def in_channels(model: nn.Module) -> int:
    return getattr(model, "in_chans", 3)


def _grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The grid with this many cells whose cells are nearest to squares, or None where none has the image's shape."""
    rows = round((tokens * height / width) ** 0.5)
    for candidate in (rows, rows - 1, rows + 1):
        if candidate > 0 and tokens % candidate == 0:
            columns = tokens // candidate
            cell_ratio = (height / candidate) / (width / columns)
            if 1 / _LONGEST_CELL < cell_ratio < _LONGEST_CELL:
                return candidate, columns
    return None
