"""FAN's two ways from pixels to tokens: convolutions with batch norm, and the first two stages of a ConvNeXt.

Shape letters: B batch, C embedding width, H × W token grid, N = H·W tokens. The state-dict names are the released ones.
"""

import itertools

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.layers import (
    PointwiseConv,
    UnbiasedLayerNorm,
    check_divisible,
    depthwise,
    recomputed,
    strip_rows,
    strips_pay,
    to_tokens,
)

HYBRID_WIDTHS = (128, 256)
PATCH_SIZES = (4, 8, 16)


class ConvStem(nn.Module):
    """Stride-2 3×3 convolutions with batch norm, GELU between them (the "ViT" variants).

    Args:
        patch_size: total stride, one of 4, 8, 16.
        in_chans: channels of the images.
        dim: embedding width C; the widths double up to it.
    """

    levels = ()  # no feature maps of its own

    def __init__(self, patch_size: int, in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        if patch_size not in PATCH_SIZES:
            raise InputError(f"patch size {patch_size} is not one of {PATCH_SIZES}")
        self.stride = patch_size
        self.grad_checkpointing = False
        steps = patch_size.bit_length() - 1
        widths = [in_chans] + [dim >> (steps - 1 - step) for step in range(steps)]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            if layers:
                layers.append(nn.GELU())
            layers.append(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, 2, 1, bias=False, device=device, dtype=dtype),
                    nn.BatchNorm2d(after, device=device, dtype=dtype),
                )
            )
        self.proj = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(B, 3, H·stride, W·stride) → tokens (B, N, C), H, W. Sides that the stride doesn't divide: `InputError`."""
        tokens, height, width, _ = self.forward_levels(images)
        return tokens, height, width

    def forward_levels(self, images: torch.Tensor) -> tuple[torch.Tensor, int, int, list[torch.Tensor]]:
        """As `forward`, with the (here empty) list of the stem's own feature maps."""
        height, width = images.shape[-2:]
        check_divisible(height, width, self.stride)
        x = self.proj(images.contiguous(memory_format=torch.channels_last))
        return to_tokens(x), height // self.stride, width // self.stride, []


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise → norm → ×4 → GELU → ×¼ → layer scale → residual, on (B, H, W, C)."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6, **dd))
        self.conv_dw = depthwise(dim, 7, **dd)
        self.norm = UnbiasedLayerNorm(dim, eps=1e-6, **dd)
        self.mlp = _PointwiseMlp(dim, **dd)

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not strips_pay(y):
            return torch.addcmul(x_BHWC, self.mlp(self.norm(y)), self.gamma)
        out_BHWC = torch.empty_like(x_BHWC, memory_format=torch.contiguous_format)
        rows = strip_rows(self.mlp.fc1.out_channels)
        for out, x, part in zip(*(each.flatten(0, 2).split(rows) for each in (out_BHWC, x_BHWC, y)), strict=True):
            torch.addcmul(x, self.mlp(self.norm(part)), self.gamma, out=out)
        return out_BHWC


class _PointwiseMlp(nn.Module):
    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        self.fc1 = PointwiseConv(dim, 4 * dim, device=device, dtype=dtype)
        self.fc2 = PointwiseConv(4 * dim, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Stage(nn.Module):
    """Optional norm and 2×2/2 convolution, then ConvNeXt blocks."""

    def __init__(self, before: int | None, dim: int, depth: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.downsample = nn.Identity()
        if before is not None:
            self.downsample = nn.Sequential(
                UnbiasedLayerNorm(before, eps=1e-6, **dd), nn.Conv2d(before, dim, 2, 2, **dd)
            )
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim, **dd) for _ in range(depth)])

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.downsample, nn.Identity):
            norm, conv = self.downsample
            x_BHWC = conv(norm(x_BHWC).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.blocks(x_BHWC)


class _ConvNeXtTrunk(nn.Module):
    def __init__(self, in_chans: int, depths: tuple[int, int], device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        first, second = HYBRID_WIDTHS
        # The stem's norm is the ordinary one; only those after it were trained with the unbiased variance.
        self.stem = nn.Sequential(nn.Conv2d(in_chans, first, 4, 4, **dd), nn.LayerNorm(first, eps=1e-6, **dd))
        self.stages = nn.Sequential(_Stage(None, first, depths[0], **dd), _Stage(first, second, depths[1], **dd))


class HybridStem(nn.Module):
    """First two stages of a ConvNeXt (strides 4 and 8), then a 2×2/2 convolution to C: stride 16 in all.

    Args:
        depths: blocks of the two stages.
        in_chans: channels of the images.
        dim: embedding width C.
    """

    stride = 16
    levels = ((HYBRID_WIDTHS[0], 4), (HYBRID_WIDTHS[1], 8))  # (channels, stride) of its own feature maps

    def __init__(self, depths: tuple[int, int], in_chans: int, dim: int, device=None, dtype=None):
        super().__init__()
        self.grad_checkpointing = False
        self.backbone = _ConvNeXtTrunk(in_chans, depths, device=device, dtype=dtype)
        self.proj = nn.Conv2d(HYBRID_WIDTHS[-1], dim, 2, 2, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """ConvNeXt's initialisation of the two stages (truncated normal 0.02, biases 0)."""
        for module in self.backbone.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int, int]:
        """(B, 3, 16·H, 16·W) → tokens (B, N, C), H, W. Sides that 16 doesn't divide: `InputError`."""
        tokens, height, width, _ = self.forward_levels(images)
        return tokens, height, width

    def forward_levels(self, images: torch.Tensor) -> tuple[torch.Tensor, int, int, list[torch.Tensor]]:
        """As `forward`, with the maps after the two stages: (B, 128, 4·H, 4·W) and (B, 256, 2·H, 2·W)."""
        height, width = images.shape[-2:]
        check_divisible(height, width, self.stride)
        conv, norm = self.backbone.stem
        x_BHWC = norm(conv(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1))
        levels = []
        for stage in self.backbone.stages:
            recompute = self.grad_checkpointing and self.training
            x_BHWC = recomputed(stage, x_BHWC) if recompute else stage(x_BHWC)
            levels.append(x_BHWC.permute(0, 3, 1, 2))
        return to_tokens(self.proj(levels[-1])), height // self.stride, width // self.stride, levels
