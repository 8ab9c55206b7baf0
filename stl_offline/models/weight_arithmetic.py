"""Weights of consecutive linear maps made one: batch norms, affine norms and layer scales folded into their neighbours.

Every function takes and returns float64 tensors, so that folding itself adds no error that float32 could see.
"""

import torch
from torch import nn


def double(parameter: torch.Tensor) -> torch.Tensor:
    """Detached float64 copy."""
    return parameter.detach().double()


def batch_norm_affine(norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift (C,) that a batch norm applies in evaluation."""
    scale = double(norm.weight) / torch.sqrt(double(norm.running_var) + norm.eps)
    return scale, double(norm.bias) - double(norm.running_mean) * scale


def affine_then_linear(
    scale: torch.Tensor, shift: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight·(scale·x + shift) + bias as one linear map; `weight` is (out, in), scale and shift are (in,)."""
    return weight * scale, bias + weight @ shift


def linear_then_scale(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """scale·(weight·x + bias) as one linear map; `weight` is (out, …), scale is (out,)."""
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale


def border_bias(shift: torch.Tensor, weight_C133: torch.Tensor) -> torch.Tensor:
    """What a zero-padded depthwise 3×3 makes of a constant `shift` (C,), by where the cell lies: (4, 4, C).

    A cell's value is shift times the sum of the kernel's taps that fall inside. The first index says which rows do: 0
    all three, 1 not the upper (first row of the grid), 2 not the lower, 3 only the middle (a grid of one row). The
    second index says the same of columns.
    """
    taps = torch.ones(4, 3, dtype=torch.float64, device=shift.device)
    taps[1, 0] = taps[2, 2] = taps[3, 0] = taps[3, 2] = 0
    kernel = weight_C133[:, 0]
    return torch.einsum("ai,bj,cij->abc", taps, taps, kernel) * shift


def border_index(length: int, device: torch.device) -> torch.Tensor:
    """Which entry of `border_bias` each row (or column) of a grid takes, (length,) int64."""
    index = torch.zeros(length, dtype=torch.int64, device=device)
    index[0] += 1
    index[-1] += 2
    return index
