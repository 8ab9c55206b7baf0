"""Weights and images that are a function of a tensor's name and shape alone, to compare implementations on numbers.

The two JSON files beside this one hold what another implementation gave, in float64, for weights filled by this rule.
"""

import hashlib
import math

import torch


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A wave whose phase comes from the name's sha256, scaled by what kind of parameter the name says it is."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    phase = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32 * 2 * math.pi
    size = math.prod(shape)
    k = torch.arange(size, dtype=torch.float64)
    wave = torch.sin(0.7 * k + 0.013 * k * torch.cos(0.001 * k) + phase)
    if name.endswith("running_var"):
        values = 1 + 0.3 * wave
    elif name.endswith("running_mean"):
        values = 0.05 * wave
    elif "gamma" in name:
        values = 0.5 + 0.2 * wave
    elif name.endswith("temperature"):
        values = 1 + 0.2 * wave
    elif name.endswith("bias"):
        values = 0.05 * wave
    elif len(shape) <= 1:
        values = 1 + 0.2 * wave
    else:
        values = wave * math.sqrt(2.0 * shape[0] / size)
    return values.reshape(shape).float()


def fill_model(model: torch.nn.Module) -> torch.nn.Module:
    """Fill every tensor of `model` by its name; evaluation mode."""
    model.load_state_dict({name: fill(name, tuple(value.shape)) for name, value in model.state_dict().items()})
    return model.eval()


def random_image(batch: int, height: int, width: int) -> torch.Tensor:
    """(B, 3, height, width) of values of about unit size."""
    wave = fill(f"input{batch}x{height}x{width}", (batch, 3, height, width))
    return wave / math.sqrt(2.0 / (3 * height * width))
