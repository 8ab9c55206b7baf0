"""The released code's way, kept as a baseline: the labeler runs in every step, on the same crop as the student.

B: batch, N: tokens, K: classes, m: classes listed for a token.
"""

from typing import Protocol

import torch
from torch import Tensor

from stl_offline.device import upload
from stl_offline.settings import EVEN, OUTSIDE


class Labeler(Protocol):
    """Gives (class logits (B, K), token logits (B, N, K)), float32."""

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def online_targets(
    labeler: Labeler,
    images: Tensor,
    kind: str,
    columns: int,
    residual: str,
    generator: torch.Generator,
    min_confidence: float = 0.0,
    class_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token targets straight from the labeler's logits: ids and weights (B, N, m).

    Args:
        images: (B, 3, H, W), spatial augmentation only, as STL shows them to the labeler.
        kind: "gumbel" (one class drawn from each token's softmax: the hard Gumbel-softmax at tau 1), "soft" (the
            ``columns`` best classes; the rest by ``residual``) or "argmax".
        generator: on the CPU.
        min_confidence: tokens whose likeliest class is less probable weigh nothing.
        class_ids: (B,) int64, the images' own classes, for the residual "class".
    """
    probabilities = labeler(images)[1].float().softmax(dim=-1)
    ids, weights = _targets(probabilities, kind, columns, residual, generator, class_ids)
    if min_confidence > 0:
        weights = weights * (probabilities.amax(dim=-1, keepdim=True) >= min_confidence)
    return ids, weights


def _targets(
    probabilities: Tensor,
    kind: str,
    columns: int,
    residual: str,
    generator: torch.Generator,
    class_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if kind == "argmax":
        ids = probabilities.argmax(dim=-1, keepdim=True)
        return ids, torch.ones_like(ids, dtype=torch.float32)
    if kind == "gumbel":
        # Inverse transform sampling: one uniform number per token, distributed as argmax(logits + Gumbel noise).
        uniform = upload(torch.rand(probabilities.shape[:2], generator=generator), probabilities.device)[..., None]
        ids = torch.searchsorted(probabilities.cumsum(dim=-1), uniform, right=True)
        return ids.clamp(max=probabilities.shape[-1] - 1), torch.ones_like(ids, dtype=torch.float32)
    weights, ids = probabilities.topk(min(columns, probabilities.shape[-1]), dim=-1)
    if residual != "ignore":
        rest = (1 - weights.sum(dim=-1, keepdim=True)).clamp(min=0)
        weights = torch.cat([weights, rest], dim=-1)
        last = torch.full_like(ids[..., :1], OUTSIDE if residual == "ghost" else EVEN)
        if residual == "class":
            last = class_ids[:, None, None].expand_as(last)
        ids = torch.cat([ids, last], dim=-1)
    return ids, weights
