"""The inference form of a FAN: the same numbers (within 1e-4), nothing kept or computed that only training needs.

Against the model itself: batch norms, norms' affine parts and layer scales are folded into the linear maps beside them;
query, key and value are one product; residuals are added in place; large hidden layers are computed in strips that stay
in the processor's cache; a CPU takes a few images at a time for the same reason; token logits only where asked for.

Shape letters: B batch, H × W token grid, N = H·W tokens, C embedding width, K classes.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.fan import Fan
from stl_offline.models.folded_parts import (
    FoldedBlock,
    FoldedConvStem,
    FoldedHybridStem,
    affine_then_linear,
    border_index,
    double,
    folded_class_block,
    linear,
)
from stl_offline.models.layers import check_divisible
from stl_offline.models.stems import HybridStem

# Tokens that a CPU takes in one pass: a few images of 224 px, whose activations fit its caches.
CPU_TOKENS_PER_PASS = 1568


def inference_form(
    model: Fan,
    *,
    token_logits: bool | None = None,
    dtype: torch.dtype | None = None,
    images_per_pass: int | None = None,
) -> "InferenceFan":
    """A frozen copy of `model` for inference; the model itself stays as it is.

    Args:
        model: a FAN with a class head.
        token_logits: give token logits too; default: where the model has a token head.
        dtype: of weights and activations before the heads, which are float32 always; default: the model's.
        images_per_pass: split larger batches; default: by size of the images on a CPU, never elsewhere.

    Raises:
        InputError: not a FAN with heads, or token logits of a model without a token head.
    """
    if not isinstance(model, Fan) or model.num_classes == 0 or model.cls_attn_blocks is None:
        raise InputError(f"only a FAN with its heads has an inference form, not this {type(model).__name__}")
    if model.global_pool != "token":
        raise InputError(f"the inference form classifies the class token, this model pools by {model.global_pool!r}")
    if token_logits is None:
        token_logits = model.token_head
    if token_logits and not model.token_head:
        raise InputError("this FAN has no token head, so there are no token logits to give")
    form = InferenceFan(model, token_logits, images_per_pass)
    return form.eval().requires_grad_(False).to_dtype(dtype or model.cls_token.dtype).to(model.cls_token.device)


class InferenceFan(nn.Module):
    """What `inference_form` gives: images → class logits (B, K), with token logits (these, (B, N, K)); float32.

    Attributes:
        num_classes, pretrained_cfg, token_logits; `grid_size(height, width)` as the model has it.
    """

    def __init__(self, model: Fan, token_logits: bool, images_per_pass: int | None):
        super().__init__()
        self.num_classes = model.num_classes
        self.pretrained_cfg = model.pretrained_cfg if hasattr(model, "pretrained_cfg") else {}
        self.token_logits = token_logits
        self.images_per_pass = images_per_pass
        self.stride = model.patch_embed.stride
        hybrid = isinstance(model.patch_embed, HybridStem)
        self.stem = FoldedHybridStem(model.patch_embed) if hybrid else FoldedConvStem(model.patch_embed)
        self.pos_embed = copy.deepcopy(model.pos_embed)
        self.cls_token = nn.Parameter(double(model.cls_token))
        self.blocks = nn.ModuleList(FoldedBlock(block) for block in model.blocks)
        self.cls_attn_blocks = nn.ModuleList(folded_class_block(block) for block in model.cls_attn_blocks)
        self.eps = model.norm.eps
        scale, shift = double(model.norm.weight), double(model.norm.bias)
        heads = (model.head, model.aux_head) if token_logits else (model.head,)
        self.heads = nn.ModuleList(
            linear(*affine_then_linear(scale, shift, double(head.weight), double(head.bias))) for head in heads
        )

    def to_dtype(self, dtype: torch.dtype) -> "InferenceFan":
        """Convert all but the heads, which become float32."""
        for name, child in self.named_children():
            child.to(torch.float32 if name == "heads" else dtype)
        self.cls_token.data = self.cls_token.data.to(dtype)
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "InferenceFan":
        """As torch has it, for `half`, `double` and their kin; the heads stay in float32."""
        super()._apply(fn, recurse)
        self.heads.float()
        return self

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (H, W) for images of height × width pixels. Not a multiple of the stride: `InputError`."""
        check_divisible(height, width, self.stride)
        return height // self.stride, width // self.stride

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Class token (B, C), and tokens (B, N, C) where token logits are asked for, normed without affine part."""
        height, width = self.grid_size(*images.shape[-2:])
        images = images.to(self.cls_token.dtype).contiguous(memory_format=torch.channels_last)
        tokens = self.stem(images).add_(self.pos_embed(height, width))
        rows, columns = border_index(height, images.device), border_index(width, images.device)
        cells = (rows[:, None] * 4 + columns[None, :]).flatten()
        for block in self.blocks:
            tokens = block(tokens, height, width, cells)
        cls = self.cls_token.expand(tokens.shape[0], -1, -1)
        for block in self.cls_attn_blocks:
            cls, tokens = block(cls, tokens)
        features = [cls[:, 0], tokens] if self.token_logits else [cls[:, 0]]
        return [F.layer_norm(feature, feature.shape[-1:], eps=self.eps) for feature in features]

    def _logits(self, images: torch.Tensor) -> list[torch.Tensor]:
        features = self._features(images)
        with torch.autocast(images.device.type, enabled=False):
            return [head(feature.float()) for head, feature in zip(self.heads, features, strict=True)]

    def _write_logits(self, images: torch.Tensor, targets: list[torch.Tensor]) -> None:
        """Logits of some images into their rows of `targets`: nothing of the logits' size is held twice."""
        for head, feature, target in zip(self.heads, self._features(images), targets, strict=True):
            rows = feature.float().flatten(0, -2)
            with torch.autocast(images.device.type, enabled=False):
                torch.addmm(head.bias, rows, head.weight.t(), out=target.flatten(0, -2))

    def _pass_size(self, images: torch.Tensor) -> int:
        if self.images_per_pass is not None:
            return self.images_per_pass
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return images.shape[0]
        height, width = self.grid_size(*images.shape[-2:])
        return max(1, CPU_TOKENS_PER_PASS // (height * width))

    def forward(self, images: torch.Tensor):
        """Normalised images (B, 3, height, width) → class logits (B, K), or (these, token logits (B, N, K))."""
        size = self._pass_size(images)
        if images.shape[0] <= size:
            logits = self._logits(images)
        elif torch.is_grad_enabled() or torch.compiler.is_compiling():
            parts = [self._logits(part) for part in images.split(size)]
            logits = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        else:
            height, width = self.grid_size(*images.shape[-2:])
            shapes = ((images.shape[0],), (images.shape[0], height * width))[: len(self.heads)]
            logits = [images.new_empty(*shape, self.num_classes, dtype=torch.float32) for shape in shapes]
            for start in range(0, images.shape[0], size):
                rows = slice(start, start + size)
                self._write_logits(images[rows], [whole[rows] for whole in logits])
        return (logits[0], logits[1]) if self.token_logits else logits[0]
