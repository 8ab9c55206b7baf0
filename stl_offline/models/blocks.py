"""FAN's blocks: token mixing, channel attention, and the class attention at the end (arXiv 2204.12451).

Shape letters: B batch, H × W token grid, N = H·W tokens, C embedding width, h heads, d = C/h. State-dict names are the
released ones; the arithmetic is the paper's, with sums in the order that needs the fewest passes over memory.
"""

import torch
import torch.nn.functional as F
from timm.layers import DropPath, use_fused_attn
from torch import nn

from stl_offline.models.layers import attention, depthwise, to_map, to_tokens


class TokenMixing(nn.Module):
    """Multi-head self-attention over tokens, with separate `q` and joint `kv` weights."""

    def __init__(self, dim: int, heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, **dd)
        self.kv = nn.Linear(dim, 2 * dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        q = self.q(x_BNC).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(x_BNC).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BhNd = attention(q, k, v, self.fused_attn)
        return self.proj(mixed_BhNd.transpose(1, 2).flatten(2))


class DepthwisePair(nn.Module):
    """Depthwise 3×3 → GELU → batch norm → depthwise 3×3."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.conv1 = depthwise(dim, 3, **dd)
        self.bn = nn.BatchNorm2d(dim, **dd)
        self.conv2 = depthwise(dim, 3, **dd)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.conv2(self.bn(F.gelu(self.conv1(x_BCHW))))


class ValueMlp(nn.Module):
    """The channel attention's value: linear ×4, plus its depthwise pair, linear ×¼; no other activation."""

    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gamma = nn.Parameter(torch.ones(hidden, **dd))
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = DepthwisePair(hidden, **dd)
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
        y = self.fc1(x_BNC)
        local = to_tokens(self.dwconv(to_map(y, height, width)))
        # In autocast's precision: a float32 gamma would make float32 maps of this width, for fc2 to cast back.
        return self.fc2(torch.addcmul(y, local, self.gamma.to(y.dtype)))


class ChannelAttention(nn.Module):
    """Weighs every channel of a value by how its tokens agree with their head's (FAN's `mlp`)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1, **dd))
        self.mlp_v = ValueMlp(dim, int(dim * mlp_ratio), **dd)
        self.norm_v = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.q = nn.Linear(dim, dim, **dd)

    def channel_weights(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """sigmoid(softmax(q)ᵀ · mean of softmax(x)) · temperature, softmaxes over tokens: (B, 1, C)."""
        q_BNhd = self.q(x_BNC).softmax(dim=1).unflatten(2, (self.heads, -1))
        k_BNh1 = x_BNC.softmax(dim=1).unflatten(2, (self.heads, -1)).mean(dim=3, keepdim=True)
        score_Bhd = (q_BNhd * k_BNh1).sum(dim=1)
        return (score_Bhd.sigmoid() * self.temperature.flatten(1)).flatten(1).unsqueeze(1)

    def forward(self, x_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return self.norm_v(self.mlp_v(x_BNC, height, width)) * self.channel_weights(x_BNC)


class FanBlock(nn.Module):
    """Token mixing, then channel attention, each with layer scale and stochastic depth."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gamma1 = nn.Parameter(torch.ones(dim, **dd))
        self.gamma2 = nn.Parameter(torch.ones(dim, **dd))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = TokenMixing(dim, heads, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = ChannelAttention(dim, heads, mlp_ratio, **dd)

    def forward(self, x_BNC: torch.Tensor, height: int, width: int) -> torch.Tensor:
        x_BNC = torch.addcmul(x_BNC, self.drop_path(self.attn(self.norm1(x_BNC))), self.gamma1)
        return torch.addcmul(x_BNC, self.drop_path(self.mlp(self.norm2(x_BNC), height, width)), self.gamma2)


class ClassAttention(nn.Module):
    """One query, the class token, over [class token; tokens] (CaiT, arXiv 2103.17239)."""

    def __init__(self, dim: int, heads: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.heads = heads
        self.fused_attn = use_fused_attn()
        self.q = nn.Linear(dim, dim, **dd)
        self.k = nn.Linear(dim, dim, **dd)
        self.v = nn.Linear(dim, dim, **dd)
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, cls_B1C: torch.Tensor, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """The class token's update (B, 1, C)."""
        x_BMC = torch.cat((cls_B1C, tokens_BNC), dim=1)
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, cls_B1C), (self.k, x_BMC), (self.v, x_BMC))
        )
        return self.proj(attention(q, k, v, self.fused_attn).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, dim, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ClassBlock(nn.Module):
    """Class attention block as the released FAN has it (XCiT's form with normed tokens).

    The tokens pass it too: t ← 2·norm2(t + gamma1·norm1(t)), since the released code adds them to themselves.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4.0, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.gamma1 = nn.Parameter(torch.ones(dim, **dd))
        self.gamma2 = nn.Parameter(torch.ones(dim, **dd))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = ClassAttention(dim, heads, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), **dd)

    def forward(self, cls_B1C: torch.Tensor, tokens_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cls_normed, tokens_normed = self.norm1(cls_B1C), self.norm1(tokens_BNC)
        cls_B1C = torch.addcmul(cls_B1C, self.attn(cls_normed, tokens_normed), self.gamma1)
        cls_B1C = self.norm2(cls_B1C)
        cls_B1C = torch.addcmul(cls_B1C, self.mlp(cls_B1C), self.gamma2)
        return cls_B1C, 2 * self.norm2(torch.addcmul(tokens_BNC, tokens_normed, self.gamma1))
