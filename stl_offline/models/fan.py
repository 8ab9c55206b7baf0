"""FAN, the Fully Attentional Network (arXiv 2204.12451), as a timm model; with a token head, STL's FAN-TL (2401.03844).

Shape letters: B batch, H × W token grid, N = H·W tokens, C embedding width, K classes.
"""

import math
from dataclasses import dataclass

import torch
from timm.layers import get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from torch import nn

from stl_offline.errors import InputError
from stl_offline.models.blocks import ClassBlock, FanBlock
from stl_offline.models.layers import FourierPositions, FullPrecisionLinear, check_divisible, recomputed
from stl_offline.models.stems import ConvStem, HybridStem

POOLS = ("token", "avg", "")


@dataclass(frozen=True)
class FanConfig:
    """The architecture of a FAN.

    patch_size: total stride of the convolutional stem (4, 8 or 16); ignored by hybrids, whose stride is 16.
    embed_dim, depth, num_heads, mlp_ratio: C, number of blocks, heads, width of the hidden layer over C.
    hybrid_depths: blocks of the two ConvNeXt stages; None for the convolutional stem.
    token_head: whether there is a token head beside the class head.
    head_init_scale: factor on the heads' initial weights and biases.
    """

    patch_size: int = 16
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 4
    mlp_ratio: float = 4.0
    hybrid_depths: tuple[int, int] | None = None
    token_head: bool = False
    head_init_scale: float = 1.0


class Fan(nn.Module):
    """FAN backbone with a class head, and a token head where ``cfg.token_head`` is set.

    Args:
        cfg: the architecture.
        img_size: side or (height, width) the model is meant for, pixels; any other size that the stem divides works.
        in_chans: channels of the images.
        num_classes: K, of both heads; 0 leaves the heads away.
        global_pool: what the class head sees: "token" (class token), "avg" (mean of the tokens) or "" (everything).
        drop_rate: dropout before the heads.
        drop_path_rate: stochastic depth, the same in every block.
    """

    def __init__(
        self,
        cfg: FanConfig,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        _check_pool(global_pool)
        if num_classes < 0:
            raise InputError(f"num_classes is {num_classes}; it must be 0 (no heads) or more")
        self.num_classes = num_classes
        self.in_chans = in_chans
        embed_dim = self.num_features = self.head_hidden_size = self.embed_dim = cfg.embed_dim
        self.global_pool = global_pool
        self.token_head = cfg.token_head
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.head_init_scale = cfg.head_init_scale

        if cfg.hybrid_depths is None:
            self.patch_embed = ConvStem(cfg.patch_size, in_chans, embed_dim, **dd)
        else:
            self.patch_embed = HybridStem(tuple(cfg.hybrid_depths), in_chans, embed_dim, **dd)
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_divisible(*self.img_size, self.patch_embed.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **dd))
        self.pos_embed = FourierPositions(embed_dim, **dd)
        self.blocks = nn.ModuleList(
            FanBlock(embed_dim, cfg.num_heads, cfg.mlp_ratio, drop_path_rate, **dd) for _ in range(cfg.depth)
        )
        self.cls_attn_blocks = nn.ModuleList(
            ClassBlock(embed_dim, cfg.num_heads, cfg.mlp_ratio, **dd) for _ in range(2)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(**dd)
        if cfg.token_head:
            self.aux_head = self._new_head(**dd)

        stride = self.patch_embed.stride
        self.feature_info = [
            {"num_chs": channels, "reduction": reduction, "module": f"patch_embed.backbone.stages.{i}"}
            for i, (channels, reduction) in enumerate(self.patch_embed.levels)
        ] + [{"num_chs": embed_dim, "reduction": stride, "module": f"blocks.{i}"} for i in range(cfg.depth)]
        self.init_weights()

    def _new_head(self, device=None, dtype=None) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        return FullPrecisionLinear(self.num_features, self.num_classes, device=device, dtype=dtype)

    def init_weights(self) -> None:
        """Initialise as the released code does: linear truncated normal 0.02, convolutions in blocks by fan-out."""
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for module in self.blocks.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                nn.init.zeros_(module.bias)
        if isinstance(self.patch_embed, HybridStem):
            self.patch_embed.init_weights()
        with torch.no_grad():
            for parameter in self._head_parameters():
                parameter.mul_(self.head_init_scale)

    def _head_parameters(self) -> list[nn.Parameter]:
        heads = (self.head, self.aux_head) if self.token_head else (self.head,)
        return [parameter for head in heads for parameter in head.parameters()]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names that weight decay skips besides 1-D parameters: position, class token, temperatures."""
        names = {name for name, _ in self.named_parameters() if name.startswith("pos_embed.")}
        names |= {name for name, _ in self.named_parameters() if name.endswith(".temperature")}
        return names | {"pos_embed", "cls_token", "temperature"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Layers for layer-wise learning rate decay: the stem, each block, each class block, the final norm."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": r"^blocks\.(\d+)",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks (and the hybrid stem's stages) in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable
        self.patch_embed.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The class head; (class head, token head) of a model with both."""
        return (self.head, self.aux_head) if self.token_head else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New, untrained heads for `num_classes` (0: none), and another pooling where `global_pool` is given."""
        if global_pool is not None:
            _check_pool(global_pool)
            self.global_pool = global_pool
        self.num_classes = num_classes
        dd = get_device_dtype(self)
        self.head = self._new_head(**dd)
        if self.token_head:
            self.aux_head = self._new_head(**dd)
        for head in (self.head, getattr(self, "aux_head", None)):
            if isinstance(head, nn.Linear):
                trunc_normal_(head.weight, std=0.02)
                nn.init.zeros_(head.bias)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, patch_size: int | None = None) -> None:
        """Note that the model is meant for images of another side or (height, width); no weight depends on it.

        Raises:
            InputError: the stem does not divide the size, or `patch_size` is not the stem's stride, which is fixed.
        """
        stride = self.patch_embed.stride
        if patch_size not in (None, stride, (stride, stride)):
            raise InputError(f"patch_size {patch_size} is not this model's stride {stride}, which its stem fixes")
        if img_size is None:
            return
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_divisible(*size, stride)
        self.img_size = size
        if hasattr(self, "pretrained_cfg"):  # set by timm's factory
            config = {**self.pretrained_cfg, "input_size": (self.in_chans, *size)}
            self.pretrained_cfg = self.default_cfg = config
        if hasattr(self, "_traits"):  # where newer versions of timm look first
            self._traits = {**self._traits, "img_size": size}

    def grid_size(self, height: int, width: int) -> tuple[int, int]:
        """Token grid (H, W) for images of height × width pixels. Not a multiple of the stride: `InputError`."""
        check_divisible(height, width, self.patch_embed.stride)
        return height // self.patch_embed.stride, width // self.patch_embed.stride

    def _run_block(self, block: nn.Module, *inputs):
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return recomputed(block, *inputs)
        return block(*inputs)

    def _class_blocks(self, tokens_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cls_B1C = self.cls_token.expand(tokens_BNC.shape[0], -1, -1)
        for block in self.cls_attn_blocks:
            cls_B1C, tokens_BNC = self._run_block(block, cls_B1C, tokens_BNC)
        return cls_B1C, tokens_BNC

    def _finish(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        """Class blocks (unless pruned) and the final norm."""
        if self.cls_attn_blocks is not None:
            tokens_BNC = torch.cat(self._class_blocks(tokens_BNC), dim=1)
        return self.norm(tokens_BNC)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, height, width) → normed [class token; tokens], (B, 1 + N, C)."""
        tokens, height, width = self.patch_embed(x)
        tokens = tokens + self.pos_embed(height, width)
        for block in self.blocks:
            tokens = self._run_block(block, tokens, height, width)
        return self._finish(tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False):
        """Features (B, 1 + N, C) → class logits (B, K), or (class logits, token logits (B, N, K)) with a token head.

        `pre_logits=True` gives what the class head would see, (B, C).
        """
        tokens = x[:, self.num_prefix_tokens :]
        if self.global_pool == "avg":
            pooled = tokens.mean(dim=1)
        elif self.global_pool == "token":
            pooled = x[:, 0]
        else:
            pooled = x
        pooled = self.head_drop(pooled)
        if pre_logits:
            return pooled
        if not self.token_head:
            return self.head(pooled)
        return self.head(pooled), self.aux_head(self.head_drop(tokens))

    def forward(self, x: torch.Tensor):
        """Normalised images (B, 3, height, width) → class logits (B, K), with a token head (these, token logits)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Maps between the blocks; index i is entry i of `feature_info` (a hybrid's two stages come first).

        Args:
            indices: which maps: None all, an int the last so many, a sequence these.
            norm: apply the final norm to the maps of blocks (a hybrid's stages have other widths and stay as they are).
            stop_early: leave blocks after the last wanted map away (only with `intermediates_only`).
            output_fmt: "NCHW" or "NLC".

        Returns:
            (final features, list of maps), or the list alone with `intermediates_only`.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise InputError(f"output_fmt {output_fmt!r} is not one of 'NCHW', 'NLC'")
        num_levels = len(self.patch_embed.levels)
        take, last = feature_take_indices(num_levels + len(self.blocks), indices)
        tokens, height, width, levels = self.patch_embed.forward_levels(x)
        maps = [level for i, level in enumerate(levels) if i in take]
        if output_fmt == "NLC":
            maps = [level.flatten(2).transpose(1, 2) for level in maps]
        tokens = tokens + self.pos_embed(height, width)
        blocks = self.blocks[: max(0, last + 1 - num_levels)] if stop_early and intermediates_only else self.blocks
        for i, block in enumerate(blocks, start=num_levels):
            tokens = self._run_block(block, tokens, height, width)
            if i in take:
                tokens_out = self.norm(tokens) if norm else tokens
                if output_fmt == "NCHW":
                    tokens_out = tokens_out.transpose(1, 2).unflatten(2, (height, width)).contiguous()
                maps.append(tokens_out)
        if intermediates_only:
            return maps
        return self._finish(tokens), maps

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head=True):
        """Remove what the maps at `indices` do not need; returns the indices as positive numbers."""
        num_levels = len(self.patch_embed.levels)
        take, last = feature_take_indices(num_levels + len(self.blocks), indices)
        self.blocks = self.blocks[: max(0, last + 1 - num_levels)]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.cls_attn_blocks = None
            self.cls_token = None
            self.num_prefix_tokens = 0
            self.reset_classifier(0, "")
        return take


def _check_pool(global_pool: str) -> None:
    if global_pool not in POOLS:
        raise InputError(f"global_pool {global_pool!r} is not one of {POOLS}")
