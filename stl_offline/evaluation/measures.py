"""What is measured of class logits, and the figures that papers make of it.

Accuracy, negative log-likelihood and calibration are kept as sums, so that batches and processes add up exactly.

B: batch, K: classes, N: tokens.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stl_offline.errors import InputError

NOT_FINITE = "the model gives logits that are not finite; check its weights, and that `amp` is not fp16"
BINS = 15  # of the calibration error, of equal width (Guo et al., arXiv 1706.04599)
_PLAIN = ("samples", "top1", "top5", "nll", "token_samples", "token_top1")

# The 15 corruptions of ImageNet-C's benchmark and the four extra ones (Hendrycks and Dietterich, arXiv 1903.12261).
BENCHMARK_CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)

# AlexNet's top-1 error, mean over the five severities, as the benchmark's authors publish it
# (github.com/hendrycks/robustness; the same numbers stand in their AugMix code, arXiv 1912.02781).
ALEXNET_ERROR = dict(
    zip(
        BENCHMARK_CORRUPTIONS,
        (
            *(0.886428, 0.894468, 0.922640),
            *(0.819880, 0.826268, 0.785948, 0.798360),
            *(0.866816, 0.826572, 0.819324, 0.564592),
            *(0.853204, 0.646056, 0.717840, 0.606500),
        ),
        strict=True,
    )
)


class Tally:
    """Sums over images: counts, log-likelihood and the bins of the calibration error.

    ``vector``: float64 (6 + 3 · `BINS`,): samples, top-1 and top-5 hits, sum of −log p(class), samples and hits of the
    token mean; then of each bin its samples, its sum of confidences and its hits.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.vector = torch.zeros(len(_PLAIN) + 3 * BINS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, logits_BK: Tensor, classes_B: Tensor) -> None:
        """Add a batch. classes_B: int64, each image's column in the logits."""
        logits = logits_BK.double()
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == classes_B[:, None]
        log_p = logits.log_softmax(dim=-1)
        self._add_plain(len(logits), hits[:, 0].sum(), hits.sum(), -log_p.gather(1, classes_B[:, None]).sum())
        self._add_bins(log_p.max(dim=-1).values.exp(), hits[:, 0])

    @torch.no_grad()
    def add_multi_label(self, logits_BK: Tensor, classes: Sequence[Sequence[int]]) -> None:
        """Add images that have several right classes, as ReaL's (arXiv 2006.07159); those that have none are left out.

        A prediction counts where it is one of them. There is no likelihood of a set of classes: it stays out.
        """
        kept = [row for row, right in enumerate(classes) if right]
        logits = logits_BK[kept].double()
        right = torch.zeros_like(logits, dtype=torch.bool)
        for row, index in enumerate(kept):
            right[row, list(classes[index])] = True
        if not kept:
            return
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = right.gather(1, best)
        self._add_plain(len(logits), hits[:, 0].sum(), hits.any(dim=1).sum(), 0.0)
        self._add_bins(logits.softmax(dim=-1).max(dim=-1).values, hits[:, 0])

    @torch.no_grad()
    def add_tokens(self, token_logits_BNK: Tensor, classes_B: Tensor) -> None:
        """Count whether the mean of an image's token logits names its class."""
        best = token_logits_BNK.double().mean(dim=1).argmax(dim=-1)
        self.vector[4] += len(best)
        self.vector[5] += (best == classes_B).sum()

    def _add_plain(self, *values: Tensor | float) -> None:
        for place, value in enumerate(values):
            self.vector[place] += value

    def _add_bins(self, confidence_B: Tensor, hits_B: Tensor) -> None:
        # A bin holds what lies above its lower edge, up to its upper one.
        bins = (torch.ceil(confidence_B * BINS) - 1).long().clamp(0, BINS - 1)
        table = self.vector[len(_PLAIN) :].view(3, BINS)
        for row, values in enumerate((torch.ones_like(confidence_B), confidence_B, hits_B.double())):
            table[row].index_add_(0, bins, values)

    def scores(self, likelihood: bool = True) -> dict[str, float]:
        """The figures, shares in [0, 1]: samples, top1, top5, ece, and where they apply nll and token_top1."""
        return scores_of(self.vector.tolist(), likelihood)


@dataclass(frozen=True)
class ClassView:
    """Which columns of the logits a score compares, and which of them is right for each class of the data.

    name; columns: int64 (k,), or None for all; right: int64 (classes of the data,), −1 for a class that has no column,
    whose images are left out.
    """

    name: str
    columns: Tensor | None
    right: Tensor

    @classmethod
    def of(cls, name: str, model_columns: Sequence[int], kept: Sequence[int] | None) -> "ClassView":
        """model_columns: each class of the data's column in the model's logits; kept: the classes that are compared."""
        if kept is None:
            return cls(name, None, torch.tensor(model_columns))
        columns = sorted(model_columns[number] for number in kept)
        place = {column: index for index, column in enumerate(columns)}
        return cls(name, torch.tensor(columns), torch.tensor([place.get(column, -1) for column in model_columns]))

    def add(self, tally: Tally, logits_BK: Tensor, labels_B: Tensor, token_logits_BNK: Tensor | None = None) -> None:
        """Add the images of a batch that are among the classes that are compared."""
        right = self.right.to(logits_BK.device, non_blocking=True)[labels_B]
        if self.has_all:  # nothing to leave out, and no wait for the GPU to look
            tally.add(self._cut(logits_BK), right)
            if token_logits_BNK is not None:
                tally.add_tokens(self._cut(token_logits_BNK), right)
            return
        kept = right >= 0
        if bool(kept.any()):
            tally.add(self._cut(logits_BK)[kept], right[kept])
            if token_logits_BNK is not None:
                tally.add_tokens(self._cut(token_logits_BNK)[kept], right[kept])

    @cached_property
    def has_all(self) -> bool:
        """Whether each class of the data is compared."""
        return bool((self.right >= 0).all())

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if self.columns is None else logits[..., self.columns.to(logits.device)]


def check_finite(values: Iterable[float]) -> None:
    """Raise `InputError` where sums or scores show that a model's logits were not finite."""
    if not all(map(math.isfinite, values)):
        raise InputError(NOT_FINITE)


def scores_of(vector: Sequence[float], likelihood: bool = True) -> dict[str, float]:
    """`Tally.scores` of stored sums. likelihood: whether the sums hold one."""
    samples, top1, top5, nll, token_samples, token_top1 = vector[: len(_PLAIN)]
    found: dict[str, float] = {"samples": int(samples), "top1": top1 / samples, "top5": top5 / samples}
    found["ece"] = calibration_error(vector[len(_PLAIN) :])
    if likelihood:
        found["nll"] = nll / samples
    if token_samples:
        found["token_top1"] = token_top1 / token_samples
    return found


def calibration_error(bins: Sequence[float]) -> float:
    """Expected calibration error: Σ over bins of |hits − confidence| ÷ all samples."""
    counts, confidences, hits = (bins[start : start + BINS] for start in range(0, 3 * BINS, BINS))
    gaps = (abs(hit - confidence) for hit, confidence in zip(hits, confidences, strict=True))
    return sum(gaps) / max(sum(counts), 1.0)


@dataclass(frozen=True)
class CorruptionScores:
    """The figures of ImageNet-C and of generated corruptions.

    error: each corruption's top-1 error, mean over severities; top1: mean accuracy over the benchmark's 15 corruptions,
    None unless all are there; retention: ``top1`` over the clean accuracy (FAN, arXiv 2204.12451), None where that is
    not known; ce: ``error`` over AlexNet's, of the benchmark's corruptions; mce: its mean, None unless all are there.
    """

    error: dict[str, float]
    top1: float | None
    retention: float | None
    ce: dict[str, float]
    mce: float | None


def corruption_scores(
    top1: Mapping[str, Mapping[int, float]], clean: float | None = None, *, generated: bool = False
) -> CorruptionScores:
    """From top-1 by corruption and severity to error, mean accuracy, retention, CE and mCE.

    Args:
        top1: corruption → severity → accuracy in [0, 1]. A corruption that lacks a severity has no figures.
        clean: accuracy on clean images of the same classes.
        generated: corruptions that were generated have neither CE nor mCE: AlexNet's errors are ImageNet-C's.
    """
    whole = {name: found for name, found in top1.items() if set(found) == set(SEVERITIES)}
    error = {name: 1 - sum(found.values()) / len(found) for name, found in whole.items()}
    own = {} if generated else ALEXNET_ERROR
    ce = {name: error[name] / own[name] for name in own if name in error}
    if not set(BENCHMARK_CORRUPTIONS) <= set(error):
        return CorruptionScores(error, None, None, ce, None)
    accuracy = 1 - sum(error[name] for name in BENCHMARK_CORRUPTIONS) / len(BENCHMARK_CORRUPTIONS)
    return CorruptionScores(
        error, accuracy, accuracy / clean if clean else None, ce, sum(ce.values()) / len(ce) if ce else None
    )
