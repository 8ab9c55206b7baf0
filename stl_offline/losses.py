"""The losses of both stages.

B: batch, N: tokens, K: classes, m: classes listed for a token.

Stage 1 (STL, arXiv 2401.03844, section 3.1): CE(class logits, y) + w · CE(pooled token logits, y).
Stage 2 (section 3.2): CE(class logits, y) + w · mean over tokens of CE(token logits, token target).
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stl_offline.settings import EVEN, OUTSIDE

# Logits worked on at once: bounds the extra memory at any class count, and on CPUs keeps them in the cache.
CHUNK_ELEMENTS = 1 << 19
GPU_CHUNK_ELEMENTS = 1 << 24


def soft_cross_entropy(logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
    """Mean over the batch of −Σ target · log softmax(logits), in float32: (B, K), (B, K) → scalar.

    Equals timm's ``SoftTargetCrossEntropy``.
    """
    return F.cross_entropy(logits_BK.float(), targets_BK.float())


def pool_tokens(token_logits_BNK: Tensor, pool: str) -> Tensor:
    """The logits of an image, from those of its tokens, in float32: (B, N, K) → (B, K).

    Args:
        pool: "mean" (STL, section 3.1), or "lme", the log of the mean of exp over the tokens (Pinheiro and Collobert,
            "From Image-level to Pixel-level Labeling with Convolutional Networks", CVPR 2015, equation 3). With the
            mean every token is asked for the image's class; with the other one those that show it are enough, so that
            the labels outline the object (`tests/benchmarks/emergence.py` measures it).
    """
    logits = token_logits_BNK.float()
    if pool == "mean":
        return logits.mean(dim=1)
    return logits.logsumexp(dim=1) - math.log(logits.shape[1])


def token_cross_entropy(
    token_logits_BNK: Tensor,
    token_ids_BNm: Tensor,
    token_weights_BNm: Tensor,
    smoothing: float = 0.0,
    *,
    ghosts: Sequence[int] | None = None,
) -> Tensor:
    """Sparse soft cross-entropy of each token, averaged over the labelled mass.

    A token's target is Σ_i weight_i · onehot(id_i); an id of −1 spreads its weight evenly over all K classes. Weights
    may sum to less than one (a share without label counts for nothing). Smoothing moves that part of a target's mass
    to all classes evenly. The loss is the sum over tokens divided by the sum of all weights (0 where none is
    labelled): a mean over the labelled mass, which does not shrink where less of it is labelled.

    An id of −2 with weight r adds −r · log(1 − Σ p), summed over the classes that the token's row lists before it, back
    to another −2 (the ``residual`` "ghost" of `TokenTargets`). It is computed as a difference of logsumexps, never as
    1 − Σ p, so it is exact however sure the student is. Where all K classes are listed, nothing is outside: it is 0.

    Args:
        token_logits_BNK: (B, N, K), any float type; the arithmetic is float32.
        token_ids_BNm: (B, N, m) int64 in [−2, K).
        token_weights_BNm: (B, N, m) float32, not negative.
        ghosts: the places in a row, ascending, that may hold an id of −2, where they are the same in all rows; a list
            ends there whatever the id is. None: they are looked for in each row, for which a GPU is waited for if
            m > 1.

    Returns:
        A float32 scalar. No dense target is made, and backward makes the gradient of the logits, in float32, and
        nothing else of that size but, for logits of another type, its copy in theirs.
    """
    ids_Tm = token_ids_BNm.reshape(-1, token_ids_BNm.shape[-1])
    is_uniform = True
    if ghosts is None:
        # Nothing stands before the only id of a row, so that nothing has to be looked for.
        counts = (ids_Tm == OUTSIDE).sum(dim=0).tolist() if ids_Tm.shape[1] > 1 else [len(ids_Tm)]
        ghosts = [place for place, count in enumerate(counts) if count]
        is_uniform = all(counts[place] == len(ids_Tm) for place in ghosts)
    return _SparseCrossEntropy.apply(
        token_logits_BNK,
        ids_Tm,
        token_weights_BNm.reshape(-1, token_weights_BNm.shape[-1]).float(),
        float(smoothing),
        ghosts,
        is_uniform,
    )


class _SparseCrossEntropy(torch.autograd.Function):
    """mass · logsumexp(z) − Σ_i a_i z_i − u · mean(z) − Σ_g r_g · logsumexp(z outside of g): listed weights a_i, evenly
    spread mass u, and r_g on all classes but those of a list g; rows T = B·N.

    The gradient, mass · p − a − u/K − Σ_g r_g · softmax(z outside of g), is made in forward, chunk by chunk while a
    chunk's numbers lie in the cache, so backward only scales it, if at all.
    """

    @staticmethod
    def forward(
        ctx,
        logits_BNK: Tensor,
        ids_Tm: Tensor,
        weights_Tm: Tensor,
        smoothing: float,
        ghosts: Sequence[int],
        is_uniform: bool,
    ) -> Tensor:
        classes = logits_BNK.shape[2]
        spread = ids_Tm == EVEN
        mass_T = weights_Tm.sum(dim=1)
        norm = mass_T.sum().clamp(min=torch.finfo(torch.float32).tiny)
        listed_Tm = weights_Tm.masked_fill(ids_Tm < 0, 0) * ((1 - smoothing) / norm)
        even_T = (smoothing * mass_T + (1 - smoothing) * (weights_Tm * spread).sum(dim=1)) / (norm * classes)
        mass_T = mass_T / norm
        outside = []
        for before, place in zip([-1, *ghosts], ghosts, strict=False):
            ghost_T = weights_Tm[:, place] * (ids_Tm[:, place] == OUTSIDE) * ((1 - smoothing) / norm)
            if place == 0:
                # It lists nothing: −log(1 − 0) = 0.
                mass_T = mass_T - ghost_T
            else:
                outside.append((_listed_before(ids_Tm, before, place, is_uniform), ghost_T))
        safe_ids_Tm = ids_Tm.clamp(min=0)
        # Looking at numbers on a GPU would wait for it.
        has_even = smoothing > 0 or logits_BNK.device.type != "cpu" or bool(even_T.any())
        total = logits_BNK.new_zeros((), dtype=torch.float32)
        gradient_TK = None
        if ctx.needs_input_grad[0]:
            # Float32 whatever the logits are: half precision has no numbers as small as these, before they are scaled.
            gradient_TK = logits_BNK.new_empty(len(mass_T), classes, dtype=torch.float32)
        for images, tokens, rows in _chunks(logits_BNK):
            # Where the logits are part of a larger tensor, a chunk at a time is copied, not all of them.
            part_tK = logits_BNK[images, tokens].reshape(-1, classes).float()
            p_tK = torch.softmax(part_tK, dim=1, out=None if gradient_TK is None else gradient_TK[rows])
            # log Σ exp(z) = max(z) − log(max p): the exponentials are taken once, not twice.
            logsumexp_t = part_tK.amax(dim=1) - p_tK.amax(dim=1).log()
            total += torch.dot(mass_T[rows], logsumexp_t)
            total -= torch.dot(listed_Tm[rows].flatten(), part_tK.gather(1, safe_ids_Tm[rows]).flatten())
            if has_even:
                total -= torch.dot(even_T[rows], part_tK.sum(dim=1))
            if gradient_TK is not None:
                p_tK.mul_(mass_T[rows, None])
                if has_even:
                    p_tK.sub_(even_T[rows, None])
                p_tK.scatter_add_(1, safe_ids_Tm[rows], -listed_Tm[rows])
            for listed_ids_Tn, ghost_T in outside:
                rest_tK, logsumexp_t = _outside(part_tK, listed_ids_Tn[rows])
                total -= torch.dot(ghost_T[rows], logsumexp_t)
                if gradient_TK is not None:
                    p_tK.sub_(rest_tK.sub_(logsumexp_t[:, None]).exp_().mul_(ghost_T[rows, None]))
        ctx.gradient_BNK = None if gradient_TK is None else gradient_TK.view(logits_BNK.shape)
        ctx.dtype = logits_BNK.dtype
        return total

    @staticmethod
    def backward(ctx, factor: Tensor):
        if ctx.gradient_BNK is None:
            raise RuntimeError("token_cross_entropy keeps its gradient for one backward; call it again for another")
        gradient_BNK, ctx.gradient_BNK = ctx.gradient_BNK, None
        if factor.device.type != "cpu" or factor.item() != 1.0:
            gradient_BNK.mul_(factor)
        return gradient_BNK.to(ctx.dtype), None, None, None, None, None


def _listed_before(ids_Tm: Tensor, before: int, place: int, is_uniform: bool) -> Tensor:
    """The classes that each row lists before ``place``, back to another −2; −1 for none.

    is_uniform: in every row that is at ``before`` (-1: it is not there).
    """
    if is_uniform:
        return ids_Tm[:, before + 1 : place]
    ids_Tn = ids_Tm[:, :place]
    # Where one stands at a place or behind it, that place belongs to its list.
    of_another_Tn = (ids_Tn == OUTSIDE).flip(1).cumsum(dim=1).flip(1) > 0
    return ids_Tn.masked_fill(of_another_Tn, EVEN)


def _outside(logits_tK: Tensor, ids_tn: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of the logits with −∞ at the listed classes (ids below 0 are none), and its logsumexp.

    A row that lists all classes keeps its logits.
    """
    gone_tn = torch.zeros_like(ids_tn, dtype=logits_tK.dtype).masked_fill_(ids_tn >= 0, -math.inf)
    rest_tK = logits_tK.scatter_add(1, ids_tn.clamp(min=0), gone_tn)
    if ids_tn.shape[1] >= logits_tK.shape[1]:
        rest_tK = torch.where((rest_tK == -math.inf).all(dim=1, keepdim=True), logits_tK, rest_tK)
    return rest_tK, rest_tK.logsumexp(dim=1)


def _chunks(logits_BNK: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Which images, which of their tokens, and which rows of T = B·N these are: whole images, or parts of one."""
    batch, tokens, classes = logits_BNK.shape
    rows = (CHUNK_ELEMENTS if logits_BNK.device.type == "cpu" else GPU_CHUNK_ELEMENTS) // max(1, classes)
    images = max(1, rows // max(1, tokens))
    step = max(1, min(rows, tokens))
    for first in range(0, batch, images):
        last = min(first + images, batch)
        for start in range(0, tokens, step):
            end = min(start + step, tokens)
            yield slice(first, last), slice(start, end), slice(first * tokens + start, (last - 1) * tokens + end)
