"""FAN's parts with everything folded that evaluation allows; `inference.py` puts them together.

First the arithmetic that makes consecutive linear maps one (batch norms, affine norms and layer scales folded into
their neighbours), then the parts. They compute what their originals compute, on the same layouts, but change maps and
tokens in place. Weights are float64 until the form is converted, so that folding adds no error that float32 could show.

Shape letters: B batch, H × W token grid, N = H·W tokens, C embedding width, h heads.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from stl_offline.models.blocks import ClassAttention, ClassBlock, FanBlock
from stl_offline.models.layers import UnbiasedLayerNorm, add_norm_gelu_mlp_, strips_pay, to_map, to_tokens
from stl_offline.models.stems import ConvNeXtBlock, ConvStem, HybridStem


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

    A cell's value is shift times the sum of the kernel's taps that fall inside. The first index is for rows: 0 all
    three fall inside, 1 not the upper (first row of the grid), 2 not the lower, 3 only the middle (a grid of one row).
    The second index is the same for columns.
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


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _conv(conv: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
    layer = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        bias=bias is not None,
        device="meta",
    )
    layer.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


def _copied(conv: nn.Conv2d) -> nn.Conv2d:
    return _conv(conv, double(conv.weight), double(conv.bias))


class FoldedConvStem(nn.Module):
    """`ConvStem` with its batch norms folded into the convolutions."""

    def __init__(self, stem: ConvStem):
        super().__init__()
        self.convs = nn.ModuleList()
        for layer in stem.proj:
            if isinstance(layer, nn.Sequential):
                conv, norm = layer
                scale, shift = batch_norm_affine(norm)
                self.convs.append(_conv(conv, double(conv.weight) * scale[:, None, None, None], shift))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.convs[0](images)
        for conv in self.convs[1:]:
            x = conv(torch.ops.aten.gelu_(x))
        return to_tokens(x)


class FoldedConvNeXtBlock(nn.Module):
    """`ConvNeXtBlock` on a (B, H, W, C) map that it changes in place."""

    def __init__(self, block: ConvNeXtBlock):
        super().__init__()
        self.conv_dw = _copied(block.conv_dw)
        scale, shift, self.eps = _norm_affine(block.norm)
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        weight1, bias1 = double(fc1.weight).flatten(1), double(fc1.bias)
        weight2, bias2 = double(fc2.weight).flatten(1), double(fc2.bias)
        self.fc1 = linear(*affine_then_linear(scale, shift, weight1, bias1))
        self.fc2 = linear(*linear_then_scale(weight2, bias2, double(block.gamma)))

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        y = self.conv_dw(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if not strips_pay(y, compiled=True):
            return x_BHWC + self.fc2(F.gelu(self.fc1(F.layer_norm(y, y.shape[-1:], eps=self.eps))))
        weights = (self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        add_norm_gelu_mlp_(x_BHWC.flatten(0, 2), y.flatten(0, 2), self.eps, *weights)
        return x_BHWC


def _norm_affine(norm: nn.LayerNorm) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Scale and shift (C,), and the eps with which the ordinary layer norm without affine part precedes them."""
    scale, shift, eps = double(norm.weight), double(norm.bias), norm.eps
    if isinstance(norm, UnbiasedLayerNorm):
        share = (norm.normalized_shape[0] - 1) / norm.normalized_shape[0]
        scale, eps = scale * share**0.5, eps * share
    return scale, shift, eps


class FoldedHybridStem(nn.Module):
    """`HybridStem` with its norms and layer scales folded."""

    def __init__(self, stem: HybridStem):
        super().__init__()
        trunk = stem.backbone
        self.conv = _copied(trunk.stem[0])
        self.norm = _layer_norm(double(trunk.stem[1].weight), double(trunk.stem[1].bias), trunk.stem[1].eps)
        first, second = trunk.stages
        self.first = nn.Sequential(*[FoldedConvNeXtBlock(block) for block in first.blocks])
        norm, conv = second.downsample
        scale, shift, self.down_eps = _norm_affine(norm)
        # The 2×2/2 convolution has no padding, so the norm's shift is the same bias everywhere.
        weight = double(conv.weight)
        bias = double(conv.bias) + torch.einsum("oihw,i->o", weight, shift)
        self.down = _conv(conv, weight * scale[:, None, None], bias)
        self.second = nn.Sequential(*[FoldedConvNeXtBlock(block) for block in second.blocks])
        self.proj = _copied(stem.proj)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x_BHWC = self.first(self.norm(self.conv(images).permute(0, 2, 3, 1)))
        x_BHWC = F.layer_norm(x_BHWC, x_BHWC.shape[-1:], eps=self.down_eps)
        x_BHWC = self.second(self.down(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return to_tokens(self.proj(x_BHWC.permute(0, 3, 1, 2)))


def _layer_norm(weight: torch.Tensor, bias: torch.Tensor, eps: float) -> nn.LayerNorm:
    norm = nn.LayerNorm(weight.shape[0], eps=eps, device="meta")
    norm.weight, norm.bias = nn.Parameter(weight), nn.Parameter(bias)
    return norm


class FoldedBlock(nn.Module):
    """`FanBlock` on tokens (B, N, C) that it changes in place."""

    def __init__(self, block: FanBlock):
        super().__init__()
        attn, mlp = block.attn, block.mlp
        self.heads = attn.heads
        weight = torch.cat((double(attn.q.weight), double(attn.kv.weight)))
        bias = torch.cat((double(attn.q.bias), double(attn.kv.bias)))
        self.eps = block.norm1.eps
        self.qkv = linear(*affine_then_linear(double(block.norm1.weight), double(block.norm1.bias), weight, bias))
        self.proj = linear(*linear_then_scale(double(attn.proj.weight), double(attn.proj.bias), double(block.gamma1)))
        self.norm2 = _layer_norm(double(block.norm2.weight), double(block.norm2.bias), block.norm2.eps)
        self.q = linear(double(mlp.q.weight), double(mlp.q.bias))
        self.temperature = nn.Parameter(double(mlp.temperature).flatten())

        value, pair, gamma = mlp.mlp_v, mlp.mlp_v.dwconv, double(mlp.mlp_v.gamma)
        scale, shift = batch_norm_affine(pair.bn)
        kernel = double(pair.conv2.weight)
        fc2 = double(value.fc2.weight)
        self.fc1 = linear(double(value.fc1.weight), double(value.fc1.bias))
        self.conv1 = _copied(pair.conv1)
        self.conv2 = _conv(pair.conv2, kernel * (gamma * scale)[:, None, None, None], None)
        # The batch norm's shift meets zero padding, so after conv2 it depends on the side a cell lies at: a bias per
        # kind of cell, carried through fc2 together with the biases of conv2 and fc2.
        constant = gamma * (border_bias(shift, kernel) + double(pair.conv2.bias))
        self.border = nn.Parameter(constant @ fc2.t() + double(value.fc2.bias))
        self.fc2 = linear(fc2, None)
        gamma2 = double(block.gamma2)
        self.norm_v = _layer_norm(double(mlp.norm_v.weight) * gamma2, double(mlp.norm_v.bias) * gamma2, mlp.norm_v.eps)

    def channel_weights(self, x_BNC: torch.Tensor) -> torch.Tensor:
        """As `ChannelAttention.channel_weights`: (B, 1, C)."""
        q_BNC = self.q(x_BNC).softmax(dim=1)
        k_BhN = x_BNC.softmax(dim=1).unflatten(2, (self.heads, -1)).mean(dim=3).transpose(1, 2)
        # All heads' keys against all channels in one product, of which each head's own channels are taken.
        score_Bhhd = (k_BhN @ q_BNC).unflatten(2, (self.heads, -1))
        score_Bdh = score_Bhhd.diagonal(dim1=1, dim2=2)
        return (score_Bdh.sigmoid() * self.temperature).transpose(1, 2).flatten(1).unsqueeze(1)

    def forward(self, x_BNC: torch.Tensor, height: int, width: int, cells: torch.Tensor) -> torch.Tensor:
        normed = F.layer_norm(x_BNC, x_BNC.shape[-1:], eps=self.eps)
        q, k, v = self.qkv(normed).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BNC = x_BNC.add_(self.proj(mixed))

        normed = self.norm2(x_BNC)
        weights_B1C = self.channel_weights(normed)
        hidden = self.fc1(normed)
        local = self.conv2(torch.ops.aten.gelu_(self.conv1(to_map(hidden, height, width))))
        value = self.fc2(hidden.add_(to_tokens(local))).add_(self.border.flatten(0, 1)[cells])
        return x_BNC.addcmul_(self.norm_v(value), weights_B1C)


class FoldedClassAttention(nn.Module):
    """`ClassAttention` without projecting every token.

    With a single query it is cheaper to carry the query through `k` and the attended mean through `v`:
    q·(W_k a) = (W_kᵀ q)·a, and Σ p (W_v a) = W_v (Σ p a), since the shares p sum to one. The key's bias moves all
    scores of a head alike, so the softmax drops it.
    """

    def __init__(self, attn: ClassAttention):
        super().__init__()
        self.heads = attn.heads
        scale = (attn.q.weight.shape[0] // attn.heads) ** -0.5
        self.q = linear(double(attn.q.weight) * scale, double(attn.q.bias) * scale)
        self.k_hdC = nn.Parameter(double(attn.k.weight).unflatten(0, (attn.heads, -1)))
        self.v_hCd = nn.Parameter(double(attn.v.weight).unflatten(0, (attn.heads, -1)).transpose(1, 2).contiguous())
        # The value's bias passes the sum over tokens unchanged, so it joins that of `proj`.
        weight = double(attn.proj.weight)
        self.proj = linear(weight, double(attn.proj.bias) + weight @ double(attn.v.bias))

    def forward(self, cls_B1C: torch.Tensor, tokens_BNC: torch.Tensor) -> torch.Tensor:
        q_hBd = self.q(cls_B1C).squeeze(1).unflatten(1, (self.heads, -1)).transpose(0, 1)
        query_BCh = torch.bmm(q_hBd, self.k_hdC).permute(1, 2, 0)
        scores_BMh = torch.cat((cls_B1C @ query_BCh, tokens_BNC @ query_BCh), dim=1)
        share_BhM = scores_BMh.softmax(dim=1).transpose(1, 2)
        mean_BhC = share_BhM[..., :1] * cls_B1C + share_BhM[..., 1:] @ tokens_BNC
        return self.proj(torch.bmm(mean_BhC.transpose(0, 1), self.v_hCd).transpose(0, 1).flatten(1)).unsqueeze(1)


def folded_class_block(block: ClassBlock) -> ClassBlock:
    """A copy of `block` with `FoldedClassAttention`."""
    attn, block.attn = block.attn, None
    folded = copy.deepcopy(block)
    block.attn = attn
    folded.attn = FoldedClassAttention(attn)
    return folded
