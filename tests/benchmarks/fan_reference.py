"""FAN written down formula by formula, as a yardstick for numbers and speed. Nothing is fused, folded or reordered.

The layers have the released state-dict names, so the same weights load here and into `stl_offline.models`.
Shape letters: B batch, H × W token grid, N = H·W tokens, C embedding width, h heads, d = C/h, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from stl_offline.models import VARIANTS


def reference(name: str, num_classes: int = 1000) -> "ReferenceFan":
    """The variant `name` of `stl_offline.models` (with or without `_token`), transcribed."""
    settings = VARIANTS[name.removesuffix("_token")]
    return ReferenceFan(
        dim=settings["embed_dim"],
        depth=settings["depth"],
        heads=settings["num_heads"],
        num_classes=num_classes,
        patch_size=settings.get("patch_size"),
        hybrid_depths=settings.get("hybrid_depths"),
        token_head=name.endswith("_token"),
    )


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, H, W); `correction` 1 divides the variance by n − 1."""

    def __init__(self, channels: int, correction: int):
        super().__init__()
        self.correction = correction
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=self.correction)
        x = (x - mean) / torch.sqrt(variance + 1e-6)
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNeXtMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, 4 * dim, 1)
        self.fc2 = nn.Conv2d(4 * dim, dim, 1)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = ChannelNorm(dim, correction=1)
        self.mlp = ConvNeXtMlp(dim)

    def forward(self, x):
        return x + self.gamma[:, None, None] * self.mlp(self.norm(self.conv_dw(x)))


class Stage(nn.Module):
    def __init__(self, dim: int, depth: int, before: int | None):
        super().__init__()
        self.downsample = nn.Identity()
        if before is not None:
            self.downsample = nn.Sequential(ChannelNorm(before, correction=1), nn.Conv2d(before, dim, 2, 2))
        self.blocks = nn.Sequential(*[ConvNeXtBlock(dim) for _ in range(depth)])

    def forward(self, x):
        return self.blocks(self.downsample(x))


class Trunk(nn.Module):
    def __init__(self, depths: tuple[int, int]):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 128, 4, 4), ChannelNorm(128, correction=0))
        self.stages = nn.Sequential(Stage(128, depths[0], None), Stage(256, depths[1], 128))

    def forward(self, x):
        return self.stages(self.stem(x))


class PatchEmbed(nn.Module):
    def __init__(self, dim: int, patch_size: int | None, hybrid_depths: tuple[int, int] | None):
        super().__init__()
        self.backbone = nn.Identity()
        if hybrid_depths is not None:
            self.backbone = Trunk(hybrid_depths)
            self.proj = nn.Conv2d(256, dim, 2, 2)
            return
        widths = {16: (8, 4, 2, 1), 8: (4, 2, 1), 4: (4, 1)}[patch_size]
        layers, before = [], 3
        for i, divisor in enumerate(widths):
            conv = nn.Conv2d(before, dim // divisor, 3, 2, 1, bias=False)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(dim // divisor))]
            layers += [nn.GELU()] if i + 1 < len(widths) else []
            before = dim // divisor
        self.proj = nn.Sequential(*layers)

    def forward(self, x):
        return self.proj(self.backbone(x))


class PositionEmbed(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.token_projection = nn.Conv2d(64, dim, 1)

    def forward(self, height: int, width: int):
        dd = {"dtype": torch.float32, "device": self.token_projection.weight.device}
        y = torch.arange(1, height + 1, **dd)[:, None].expand(height, width) / (height + 1e-6)
        x = torch.arange(1, width + 1, **dd)[None, :].expand(height, width) / (width + 1e-6)
        i = torch.arange(32, **dd)
        divisor = 10000 ** (2 * torch.floor(i / 2) / 32)
        channels = []
        for position in (y, x):
            angle = position[:, :, None] * 2 * math.pi / divisor
            channels.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=3).flatten(2))
        waves = torch.cat(channels, dim=2).permute(2, 0, 1)[None]
        return self.token_projection(waves.to(self.token_projection.weight.dtype))


class TokenAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.heads, C // self.heads).permute(0, 2, 1, 3)
        k, v = self.kv(x).reshape(B, N, 2, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1)) * (C // self.heads) ** -0.5
        attention = attention.softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class DepthwisePair(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x, height: int, width: int):
        B, N, C = x.shape
        x = x.permute(0, 2, 1).reshape(B, C, height, width)
        x = self.conv2(self.bn(F.gelu(self.conv1(x))))
        return x.reshape(B, C, N).permute(0, 2, 1)


class ValueMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4 * dim))
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.dwconv = DepthwisePair(4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x, height: int, width: int):
        y = self.fc1(x)
        return self.fc2(y + self.gamma * self.dwconv(y, height, width))


class ChannelAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = ValueMlp(dim)
        self.norm_v = nn.LayerNorm(dim, eps=1e-5)
        self.q = nn.Linear(dim, dim)

    def _heads(self, x):
        B, N, C = x.shape
        return x.reshape(B, N, self.heads, C // self.heads).permute(0, 2, 1, 3)  # (B, h, N, d)

    def forward(self, x, height: int, width: int):
        B, N, C = x.shape
        value = self._heads(self.norm_v(self.mlp_v(x, height, width)))
        q = self._heads(self.q(x)).softmax(dim=-2)
        k = self._heads(x).softmax(dim=-2).mean(dim=-1, keepdim=True)
        weight = torch.sigmoid(q.transpose(-1, -2) @ k) * self.temperature  # (B, h, d, 1)
        value = weight * value.transpose(-1, -2)
        return value.permute(0, 3, 1, 2).reshape(B, N, C)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = TokenAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ChannelAttention(dim, heads)

    def forward(self, x, height: int, width: int):
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x), height, width)


class ClassAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        B, M, C = x.shape
        q = self.q(x[:, :1]).reshape(B, 1, self.heads, C // self.heads).permute(0, 2, 1, 3)
        k = self.k(x).reshape(B, M, self.heads, C // self.heads).permute(0, 2, 1, 3)
        v = self.v(x).reshape(B, M, self.heads, C // self.heads).permute(0, 2, 1, 3)
        attention = ((q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, 1, C))


class ClassMlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class ClassBlock(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ClassMlp(dim)

    def forward(self, x):
        a = self.norm1(x)
        x = x + self.gamma1 * torch.cat((self.attn(a), a[:, 1:]), dim=1)
        r = x = self.norm2(x)
        cls = self.gamma2 * self.mlp(x[:, :1])
        return r + torch.cat((cls, x[:, 1:]), dim=1)


class ReferenceFan(nn.Module):
    """Class logits (B, K), with a token head (class logits, token logits (B, N, K))."""

    def __init__(self, dim, depth, heads, num_classes, patch_size, hybrid_depths, token_head):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.patch_embed = PatchEmbed(dim, patch_size, hybrid_depths)
        self.pos_embed = PositionEmbed(dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.cls_attn_blocks = nn.ModuleList([ClassBlock(dim, heads) for _ in range(2)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        self.aux_head = nn.Linear(dim, num_classes) if token_head else None

    def forward(self, images):
        x = self.patch_embed(images)
        height, width = x.shape[-2:]
        x = (x + self.pos_embed(height, width)).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, height, width)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.cls_attn_blocks:
            x = block(x)
        x = self.norm(x)
        if self.aux_head is None:
            return self.head(x[:, 0])
        return self.head(x[:, 0]), self.aux_head(x[:, 1:])
