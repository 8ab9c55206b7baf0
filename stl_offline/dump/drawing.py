"""Classes drawn from a labeler's whole softmax, so that the same image, view and token give the same classes anywhere.

argmax over classes of logit + Gumbel noise is a draw from the softmax (Gumbel-max: Yellott, J. Math. Psychology 15,
1977). The noise is a pure function of (seed, content of the image, view, token, draw, class): batches, processes, order
and restarts have no effect. Logits that differ by rounding give the same draws, except where two classes are about as
good.

B: images; N: tokens; K: classes; k: classes kept beside the draws; S: draws of a token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_offline.random import draw_keys, philox_arrays

# Logits whose noise is made at a time: on CPUs the intermediate arrays stay in the cache.
_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 24


@dataclass(frozen=True)
class DrawKey:
    """What the noise of a batch depends on.

    seed: of the dump; stream: of `stl_offline.random`; hashes: uint64 (B,), the content of the images; view: its number
    among those of the random family.
    """

    seed: int
    stream: int
    hashes: np.ndarray
    view: int


def draw_classes(logits: Tensor, draws: int, key: DrawKey, without: Tensor | None = None) -> Tensor:
    """Classes drawn from the softmax: logits (B, N, K) → int64 (B, N, S).

    Args:
        draws: S.
        without: int64 (B, N, k), classes that are not drawn.
    """
    found = torch.empty((*logits.shape[:2], draws), dtype=torch.int64, device=logits.device)
    for draw, rows, scores in _noisy(logits, draws, key, without):
        found.view(-1, draws)[rows, draw] = scores.argmax(dim=-1)
    return found


def draw_shortfall(logits: Tensor, stored: Tensor, key: DrawKey, without: Tensor | None = None) -> Tensor:
    """How far each stored draw's noisy logit is below the best one: int64 (B, N, S) → float32 (B, N, S).

    0 where the draw is the same again. What a small difference of logits explains is a near tie.
    """
    short = torch.empty(stored.shape, dtype=torch.float32, device=logits.device)
    draws = stored.shape[-1]
    for draw, rows, scores in _noisy(logits, draws, key, without):
        own = scores.gather(1, stored.reshape(-1, draws)[rows, draw, None])[:, 0]
        short.view(-1, draws)[rows, draw] = scores.amax(dim=-1) - own
    return short


def _noisy(logits, draws, key, without):
    """Logits with noise, for each draw and some rows of the B·N tokens at a time: (draw, rows, float32 (rows, K))."""
    _, tokens, classes = logits.shape
    flat = logits.float().reshape(-1, classes)
    if without is not None and without.shape[-1]:
        flat = flat.scatter(1, without.reshape(len(flat), -1), -torch.inf)
    blocks = torch.arange(-(-classes // 4), device=logits.device)
    chunk = max(1, (_CHUNK if logits.device.type == "cpu" else _GPU_CHUNK) // classes)
    for draw in range(draws):
        keys = torch.from_numpy(draw_keys(key.seed, key.stream, key.hashes, key.view, tokens, draw))
        keys = keys.reshape(-1, 4).to(logits.device)
        for first in range(0, len(flat), chunk):
            rows = slice(first, first + chunk)
            k0, k1, c2, c3 = (part[:, None] for part in keys[rows].unbind(dim=1))
            bits = torch.stack(philox_arrays((blocks, c2, c3, torch.zeros_like(c2)), (k0, k1)), dim=-1)
            yield draw, rows, flat[rows] - _log_exponential(bits.reshape(len(c2), -1)[:, :classes])


def _log_exponential(bits: Tensor) -> Tensor:
    """Random uint32 → the logarithm of an exponential variable, whose negative is a Gumbel variable; float32.

    −log(1 − u), not −log(u): small values, which decide who wins, keep float32's whole precision.
    """
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return torch.log(-torch.log1p(-uniform))
