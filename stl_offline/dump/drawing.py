"""Classes drawn from a labeler's whole softmax, so that the same image, view and token give the same classes anywhere.

argmax over classes of logit + Gumbel noise is a draw from the softmax (Gumbel-max: Yellott, J. Math. Psychology 15,
1977). The noise is a pure function of (seed, content of the image, view, token, draw, class): batches, processes, order
and restarts have no effect. Logits that differ by rounding give the same draws, except where two classes are about as
good.

B: images; N: tokens; K: classes; k: classes kept beside the draws; S: draws of a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_offline.compiled import njit, read_only
from stl_offline.device import upload
from stl_offline.random import draw_keys, philox, philox_arrays

# Logits whose noise is made at a time: on CPUs the intermediate arrays stay in the cache.
_CHUNK = 1 << 16
_GPU_CHUNK = 1 << 24
# Compiled code leaves the choice to torch, whose logarithms differ in the last bits, where two classes' noisy logits
# are as close as this, and where logits are so large that float32 rounds them by as much. Weights round by the slack.
_NEAR, _LARGE = 1e-3, 1e3
_SLACK = 1 + 1e-3


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
    if logits.device.type == "cpu":
        _draw_quickly(_rows(logits, without), key, found)
        return found
    for draw, rows, scores in _noisy(_rows(logits, without), key, found):
        found.view(-1, draws)[rows, draw] = scores.argmax(dim=-1)
    return found


def draw_shortfall(logits: Tensor, stored: Tensor, key: DrawKey, without: Tensor | None = None) -> Tensor:
    """How far each stored draw's noisy logit is below the best one: int64 (B, N, S) → float32 (B, N, S).

    0 where the draw is the same again. What a small difference of logits explains is a near tie.
    """
    short = torch.empty(stored.shape, dtype=torch.float32, device=logits.device)
    draws = stored.shape[-1]
    for draw, rows, scores in _noisy(_rows(logits, without), key, stored):
        own = scores.gather(1, stored.reshape(-1, draws)[rows, draw, None])[:, 0]
        short.view(-1, draws)[rows, draw] = scores.amax(dim=-1) - own
    return short


def _rows(logits: Tensor, without: Tensor | None) -> Tensor:
    """Logits (B, N, K) as float32 (B·N, K), −∞ where a class is not to be drawn."""
    flat = logits.float().reshape(-1, logits.shape[-1])
    if without is not None and without.shape[-1]:
        flat = flat.scatter(1, without.reshape(len(flat), -1), -torch.inf)
    return flat


def _keys(key: DrawKey, tokens: int, draw: int) -> Tensor:
    """Of all tokens for one of their draws: int64 (B·N, 4)."""
    return torch.from_numpy(draw_keys(key.seed, key.stream, key.hashes, key.view, tokens, draw)).reshape(-1, 4)


def _noisy(flat: Tensor, key: DrawKey, stored: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
    """Logits (B·N, K) with noise, for each of the draws that ``stored`` (B, N, S) has room for, and some rows at a
    time: (draw, rows, float32 (rows, K))."""
    classes, (_, tokens, draws) = flat.shape[1], stored.shape
    chunk = max(1, (_CHUNK if flat.device.type == "cpu" else _GPU_CHUNK) // classes)
    for draw in range(draws):
        keys = upload(_keys(key, tokens, draw), flat.device)
        for first in range(0, len(flat), chunk):
            rows = slice(first, first + chunk)
            yield draw, rows, _add_noise(flat[rows], keys[rows])


def _add_noise(flat: Tensor, keys: Tensor) -> Tensor:
    """Logits (rows, K) and keys (rows, 4) → noisy logits, float32 (rows, K)."""
    blocks = torch.arange(-(-flat.shape[1] // 4), device=flat.device)
    k0, k1, c2, c3 = (part[:, None] for part in keys.unbind(dim=1))
    bits = torch.stack(philox_arrays((blocks, c2, c3, torch.zeros_like(c2)), (k0, k1)), dim=-1)
    return flat - _log_exponential(bits.reshape(len(c2), -1)[:, : flat.shape[1]])


def _draw_quickly(flat: Tensor, key: DrawKey, found: Tensor) -> None:
    """`draw_classes` on CPUs: the same classes, into ``found``, with few logarithms.

    A class can win only if its noise is below a limit that falls with the best one found so far. Since −log(1 − u) ≥ u,
    one comparison of random bits rules out nearly all classes.
    """
    _, tokens, draws = found.shape
    highest = flat.amax(dim=1, keepdim=True)
    # With the highest logit 0, so that the weights of classes that could ever win are no zeros.
    raised = flat - highest
    scores, weights = read_only(raised.numpy()), read_only((raised.exp() * _SLACK).numpy())
    large = highest[:, 0].abs() > _LARGE
    best = torch.empty(len(flat), dtype=torch.int64)
    for draw in range(draws):
        keys = _keys(key, tokens, draw)
        _best_classes(scores, weights, read_only(keys.numpy()), best.numpy())
        again = torch.nonzero((best < 0) | large)[:, 0]
        if len(again):
            best[again] = _add_noise(flat[again], keys[again]).argmax(dim=1)
        found.view(-1, draws)[:, draw] = best


@njit
def _best_classes(scores, weights, keys, best):
    """The class with the highest noisy score in each row, −1 where another is near: scores, weights (rows, K), keys
    (rows, 4), best (rows,)."""
    rows, classes = scores.shape
    # Four classes a block, each in a row of its own, for vector instructions.
    bits = np.empty((4, (classes + 3) // 4), dtype=np.uint32)
    for row in range(rows):
        k0, k1, c2, c3 = keys[row]
        for block in range(bits.shape[1]):
            b0, b1, b2, b3 = philox(block, c2, c3, 0, k0, k1)
            bits[0, block] = b0
            bits[1, block] = b1
            bits[2, block] = b2
            bits[3, block] = b3
        first = -np.inf
        second = -np.inf
        at = np.int64(-1)
        # Of random bits, for a weight of 1: with more, a class does not come near the first.
        limit = np.float32(np.inf)
        for class_id in range(classes):
            noise = np.float32(bits[class_id & 3, class_id >> 2])
            if noise >= weights[row, class_id] * limit:
                continue
            uniform = min((noise + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
            score = np.float64(scores[row, class_id]) - np.log(-np.log1p(-np.float64(uniform)))
            if score > first:
                second = first
                first = score
                at = class_id
                limit = np.float32(min(np.exp(_NEAR - first) * 2.0**32, 3e38))
            elif score > second:
                second = score
        best[row] = at if first - second > _NEAR else -1


def _log_exponential(bits: Tensor) -> Tensor:
    """Random uint32 → the logarithm of an exponential variable, whose negative is a Gumbel variable; float32.

    −log(1 − u), not −log(u): small values, which decide who wins, keep float32's whole precision.
    """
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return torch.log(-torch.log1p(-uniform))
