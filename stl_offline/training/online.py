"""The released code's way, kept as a baseline: the labeler runs in every step, on the same crop as the student.

B: batch, N: tokens, K: classes, m: classes listed for a token.
"""

from typing import Protocol

import torch
from torch import Tensor


class Labeler(Protocol):
    """Gives (class logits (B, K), token logits (B, N, K)), float32."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def online_targets(
    labeler: Labeler, images: Tensor, kind: str, columns: int, residual: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Token targets straight from the labeler's logits: ids and weights (B, N, m).

    Args:
        images: (B, 3, H, W), spatial augmentation only, as STL shows them to the labeler.
        kind: "gumbel" (one class drawn from each token's softmax: the hard Gumbel-softmax at tau 1), "soft" (the
            ``columns`` best classes; the rest by ``residual``) or "argmax".
        generator: on the CPU.
    """
    logits = labeler(images)[1].float()
    if kind == "argmax":
        ids = logits.argmax(dim=-1, keepdim=True)
        return ids, torch.ones_like(ids, dtype=torch.float32)
    probabilities = logits.softmax(dim=-1)
    if kind == "gumbel":
        # Inverse transform sampling: one uniform number a token, distributed as argmax(logits + Gumbel noise).
        uniform = torch.rand(logits.shape[:2], generator=generator).to(logits.device)[..., None]
        ids = torch.searchsorted(probabilities.cumsum(dim=-1), uniform, right=True)
        return ids.clamp(max=logits.shape[-1] - 1), torch.ones_like(ids, dtype=torch.float32)
    weights, ids = probabilities.topk(min(columns, logits.shape[-1]), dim=-1)
    if residual == "uniform":
        rest = (1 - weights.sum(dim=-1, keepdim=True)).clamp(min=0)
        weights = torch.cat([weights, rest], dim=-1)
        ids = torch.cat([ids, torch.full_like(ids[..., :1], -1)], dim=-1)
    return ids, weights
