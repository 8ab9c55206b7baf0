"""The losses of both stages.

B: batch, N: tokens, K: classes, m: classes listed for a token.

Stage 1 (STL, arXiv 2401.03844, section 3.1): CE(class logits, y) + w · CE(mean token logits, y).
Stage 2 (section 3.2): CE(class logits, y) + w · mean over tokens of CE(token logits, token target).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits worked on at once: bounds the extra memory at any class count, and on CPUs keeps them in the cache.
CHUNK_ELEMENTS = 1 << 18
GPU_CHUNK_ELEMENTS = 1 << 24


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Mean over the batch of −Σ target · log softmax(logits), in float32: (B, K), (B, K) → scalar.

    Equals timm's ``SoftTargetCrossEntropy``.
    """
    return F.cross_entropy(logits_BK.float(), targets_BK.float())


def token_cross_entropy(
    token_logits_BNK: Tensor, token_ids_BNm: Tensor, token_weights_BNm: Tensor, smoothing: float = 0.0
) -> Tensor:
    """Sparse soft cross-entropy of each token, averaged over the labelled mass.

    A token's target is Σ_i weight_i · onehot(id_i); an id of −1 spreads its weight evenly over all K classes. Weights
    may sum to less than one (a share without label counts for nothing). Smoothing moves that part of a target's mass
    to all classes evenly. The loss is the sum over tokens divided by the sum of all weights (0 where none is
    labelled), so that w keeps its meaning whatever share of the tokens is labelled.

    Args:
        token_logits_BNK: (B, N, K), any float type; the arithmetic is float32.
        token_ids_BNm: (B, N, m) int64 in [−1, K).
        token_weights_BNm: (B, N, m) float32, not negative.

    Returns:
        A float32 scalar. No dense target is made, and backward makes the gradient of the logits and nothing else of
        that size.
    """
    classes = token_logits_BNK.shape[-1]
    return _SparseCrossEntropy.apply(
        token_logits_BNK.reshape(-1, classes),
        token_ids_BNm.reshape(-1, token_ids_BNm.shape[-1]),
        token_weights_BNm.reshape(-1, token_weights_BNm.shape[-1]).float(),
        float(smoothing),
    )


class _SparseCrossEntropy(torch.autograd.Function):
    """mass · logsumexp(z) − Σ_i a_i z_i − u · mean(z): listed weights a_i, evenly spread mass u; rows T = B·N.

    The gradient, mass · p − a − u/K, is made in forward, chunk by chunk while a chunk's numbers lie in the cache, so
    backward only scales it.
    """

    @staticmethod
    def forward(ctx, logits_TK: Tensor, ids_Tm: Tensor, weights_Tm: Tensor, smoothing: float) -> Tensor:
        classes = logits_TK.shape[1]
        spread = ids_Tm < 0
        mass_T = weights_Tm.sum(dim=1)
        norm = mass_T.sum().clamp(min=torch.finfo(torch.float32).tiny)
        listed_Tm = weights_Tm.masked_fill(spread, 0) * ((1 - smoothing) / norm)
        even_T = (smoothing * mass_T + (1 - smoothing) * (weights_Tm * spread).sum(dim=1)) / (norm * classes)
        mass_T = mass_T / norm
        safe_ids_Tm = ids_Tm.clamp(min=0)
        total = logits_TK.new_zeros((), dtype=torch.float32)
        ctx.gradient_TK = torch.empty_like(logits_TK) if ctx.needs_input_grad[0] else None
        for rows in _chunks(logits_TK):
            part_tK = logits_TK[rows].float()
            p_tK = torch.softmax(part_tK, dim=1)
            # log Σ exp(z) = max(z) − log(max p): the exponentials are taken once, not twice.
            logsumexp_t = part_tK.amax(dim=1) - p_tK.amax(dim=1).log()
            total += torch.dot(mass_T[rows], logsumexp_t)
            total -= torch.dot(listed_Tm[rows].flatten(), part_tK.gather(1, safe_ids_Tm[rows]).flatten())
            total -= torch.dot(even_T[rows], part_tK.sum(dim=1))
            if ctx.gradient_TK is not None:
                p_tK.mul_(mass_T[rows, None]).sub_(even_T[rows, None])
                p_tK.scatter_add_(1, safe_ids_Tm[rows], -listed_Tm[rows])
                ctx.gradient_TK[rows] = p_tK
        return total

    @staticmethod
    def backward(ctx, factor: Tensor):
        if ctx.gradient_TK is None:
            raise RuntimeError("token_cross_entropy keeps its gradient for one backward; call it again for another")
        gradient_TK, ctx.gradient_TK = ctx.gradient_TK, None
        return gradient_TK.mul_(factor.to(gradient_TK.dtype)), None, None, None


def _chunks(logits_TK: Tensor) -> list[slice]:
    elements = CHUNK_ELEMENTS if logits_TK.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    rows = max(1, elements // max(1, logits_TK.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(logits_TK), rows)]
