"""Small layers of FAN: Fourier positions, the unbiased layer norm, the channels-last depthwise convolution.

Shape letters: B batch, H × W token grid, N = H·W tokens, C channels. Feature maps are kept as (B, H, W, C): that is the
memory of a channels-last (B, C, H, W) tensor, so tokens, maps and convolutions share one layout and nothing is copied.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from timm.models import checkpoint, register_notrace_function, register_notrace_module
from torch import nn

from stl_offline.models.input_size import InputSizeError

POSITION_CHANNELS = 32  # of y, and as many of x
POSITION_TEMPERATURE = 10000.0


@register_notrace_function
def check_divisible(height: int, width: int, stride: int) -> None:
    """Raise `InputError` unless both sides of an image (pixels) are positive multiples of the stem's stride."""
    if height < stride or width < stride or height % stride or width % stride:
        raise InputSizeError(
            f"this FAN cannot take images of {height}×{width} (height × width): "
            f"both sides must be positive multiples of {stride}"
        )


def to_map(tokens_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N, C) → (B, C, H, W) in channels-last memory, a view."""
    return tokens_BNC.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def to_tokens(map_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) → (B, N, C); a view where the map is channels-last."""
    return map_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def recomputed(module: nn.Module, *inputs):
    """Run `module` without keeping its activations; the backward pass runs it again (gradient checkpointing).

    The second run does not count its batch into batch norm's running statistics again.
    """
    if torch.compiler.is_compiling():  # the compiler traces checkpoints, but not with contexts of ours
        return checkpoint(module, *inputs)
    contexts = (contextlib.nullcontext(), _fixed_statistics(module))
    return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: contexts)


def fix_statistics_in_recomputation(model: nn.Module) -> None:
    """Let batch norms count a batch once where another package recomputes them in the backward pass, as timm does."""

    def before(norm: nn.Module, _: object) -> None:
        # Within the backward pass, as torch's own checkpointing asks for it.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            norm.before_recomputation = norm.momentum, norm.num_batches_tracked
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def after(norm: nn.Module, *_: object) -> None:
        if norm.before_recomputation is not None:
            norm.momentum, norm.num_batches_tracked = norm.before_recomputation
            norm.before_recomputation = None

    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not hasattr(norm, "before_recomputation"):
            norm.before_recomputation = None
            norm.register_forward_pre_hook(before)
            norm.register_forward_hook(after, always_call=True)


@contextlib.contextmanager
def _fixed_statistics(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


@register_notrace_module
class FourierPositions(nn.Module):
    """Position embedding of any H × W grid: sines and cosines of y and x, projected (XCiT, arXiv 2106.09681).

    Args:
        dim: embedding width C.
    """

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.token_projection = nn.Conv2d(2 * POSITION_CHANNELS, dim, 1, device=device, dtype=dtype)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """Embedding of every token, (1, N, C), in the weights' type; the angles themselves are float32."""
        weight = self.token_projection.weight.flatten(1)
        rows = _axis_waves(height, weight.device).to(weight.dtype)
        columns = _axis_waves(width, weight.device).to(weight.dtype)
        # The projection of [y waves, x waves] is the sum of two small ones: O(H + W) products instead of O(H·W).
        of_y = F.linear(rows, weight[:, :POSITION_CHANNELS])
        of_x = F.linear(columns, weight[:, POSITION_CHANNELS:], self.token_projection.bias)
        return (of_y[:, None, :] + of_x[None, :, :]).flatten(0, 1).unsqueeze(0)


def _axis_waves(length: int, device: torch.device) -> torch.Tensor:
    """Interleaved sin, cos of one axis' positions: (length, 32) float32."""
    position = torch.arange(1, length + 1, device=device, dtype=torch.float32)
    position = position / (length + 1e-6) * (2 * math.pi)
    exponent = torch.arange(0, POSITION_CHANNELS, 2, device=device, dtype=torch.float32) / POSITION_CHANNELS
    angle = position[:, None] / POSITION_TEMPERATURE**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class UnbiasedLayerNorm(nn.LayerNorm):
    """Layer norm over the last axis that divides by the variance with n − 1, as the released FAN weights need.

    With s = (n − 1) / n, the unbiased form is (x − mean) / √(var / s + eps) = √s · (x − mean) / √(var + s·eps): the
    ordinary, fused layer norm with another eps and a scaled weight.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        channels = self.normalized_shape[0]
        share = (channels - 1) / channels
        return F.layer_norm(x, self.normalized_shape, self.weight * math.sqrt(share), self.bias, self.eps * share)


class PointwiseConv(nn.Conv2d):
    """1×1 convolution (4-D weight, as in the released state dict) applied to the last axis as a matrix product."""

    def __init__(self, in_channels: int, out_channels: int, device=None, dtype=None):
        super().__init__(in_channels, out_channels, 1, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.flatten(1), self.bias)


def _is_autocast(x: torch.Tensor) -> bool:
    # Symbolic tracing has stand-ins for tensors; the meta device knows no autocast. torch 2.11's compiler cannot trace
    # the question whether a device does.
    device = x.device.type if isinstance(x, torch.Tensor) else "meta"
    if device == "meta":
        return False
    knows = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    return knows and torch.is_autocast_enabled(device)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients; each module has its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


class FullPrecisionLinear(nn.Linear):
    """A linear layer that autocast leaves in its own precision: a head, whose gradients are small numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _is_autocast(x):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


def attention(q_BhNd: torch.Tensor, k_BhMd: torch.Tensor, v_BhMd: torch.Tensor, fused: bool) -> torch.Tensor:
    """softmax(q·kᵀ/√d)·v: (B, h, N, d). ``fused``: by torch's kernel, not in three operations (timm's `fused_attn`)."""
    if fused:
        return F.scaled_dot_product_attention(q_BhNd, k_BhMd, v_BhMd)
    score_BhNM = (q_BhNd * q_BhNd.shape[-1] ** -0.5) @ k_BhMd.transpose(-2, -1)
    return score_BhNM.softmax(dim=-1) @ v_BhMd


def depthwise(channels: int, kernel: int, device=None, dtype=None) -> nn.Conv2d:
    """Depthwise convolution with bias that keeps the grid."""
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, device=device, dtype=dtype)


# Hidden values that a strip may hold: 4 MB in float32, a core's share of the last cache.
STRIP_VALUES = 1 << 20


def strip_rows(hidden: int) -> int:
    """Rows of a strip whose hidden layer is `hidden` wide."""
    return max(1, STRIP_VALUES // hidden)


@torch.library.custom_op("stl_offline::add_norm_gelu_mlp_", mutates_args=("target_MC",))
def add_norm_gelu_mlp_(
    target_MC: torch.Tensor,
    x_MC: torch.Tensor,
    eps: float,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
) -> None:
    """target += W₂·gelu(W₁·norm(x) + b₁) + b₂ in place, without autograd, in strips of rows.

    A hidden layer as a whole would be many times larger than the caches, and new memory of that size costs more time
    than the product that fills it. To compilers this is one operator, so that they do not unroll the strips.

    Args:
        target_MC, x_MC: contiguous, (M, C).
        eps: of the layer norm, which has no affine part.
        weight1, bias1, weight2, bias2: as in `nn.Linear`: (4C, C), (4C,), (C, 4C), (C,).
    """
    rows = strip_rows(weight1.shape[0])
    scratch = x_MC.new_empty(min(rows, x_MC.shape[0]), weight1.shape[0])
    for target, x in zip(target_MC.split(rows), x_MC.split(rows), strict=True):
        hidden = scratch[: x.shape[0]]
        torch.addmm(bias1, F.layer_norm(x, x.shape[1:], eps=eps), weight1.t(), out=hidden)
        torch.ops.aten.gelu_(hidden)
        target.add_(bias2).addmm_(hidden, weight2.t())


def strips_pay(x: torch.Tensor, compiled: bool = False) -> bool:
    """Whether work in strips is possible and faster: on a CPU, without autograd and autocast, not while tracing.

    `compiled`: also under torch.compile, which is fine for an operator of our own; exported graphs have none.
    """
    tracing = torch.jit.is_tracing() or (torch.compiler.is_compiling() and (not compiled or _is_exporting()))
    return (
        not torch.is_grad_enabled()
        and isinstance(x, torch.Tensor)  # symbolic tracing has stand-ins
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not tracing
    )


def _is_exporting() -> bool:
    # Where torch cannot tell compiling from exporting, no operator of ours gets into either.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()
