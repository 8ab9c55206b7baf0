"""What one optimiser step is made of: its random numbers, its inputs, its losses.

B: images of a step in this process; N: tokens; K: classes; m: classes listed for a token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.random import step_generator


@dataclass(frozen=True)
class StepRandom:
    """The generators of one step: both are functions of (seed, rank, step) alone."""

    numpy: np.random.Generator
    torch: torch.Generator

    @classmethod
    def of(cls, seed: int, rank: int, step: int) -> "StepRandom":
        numpy = step_generator(seed, rank, step)
        generator = torch.Generator().manual_seed(int(numpy.integers(2**62)))
        return cls(numpy, generator)


class Inputs(Protocol):
    """All that a step learns from: what the loop itself does with it."""

    def __len__(self) -> int:
        """Images."""
        ...

    def parts(self, count: int) -> Iterator["Inputs"]:
        """The same in ``count`` nearly equal parts; fewer where there are fewer images."""
        ...

    def first(self, count: int) -> "Inputs":
        """The first images alone, in memory of their own."""
        ...

    def totals(self) -> Tensor:
        """(2,) float64: images, and labelled mass (images where nothing else is counted)."""
        ...

    @property
    def places(self) -> int:
        """What can be labelled in one image: tokens or pixels; 1 where the image itself is."""
        ...


@dataclass(frozen=True)
class StepInputs:
    """All that a step learns from, augmented and mixed.

    images: (B, 3, H, W); class_targets: (B, K), rows sum to 1; token_ids: int64 (B, N, m) and token_weights: float32
    (B, N, m) as in `stl_offline.losses.token_cross_entropy`, or both None.
    """

    images: Tensor
    class_targets: Tensor
    token_ids: Tensor | None = None
    token_weights: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def parts(self, count: int) -> Iterator["StepInputs"]:
        """The same in ``count`` nearly equal parts; fewer where there are fewer images."""
        fields = (self.images, self.class_targets, self.token_ids, self.token_weights)
        cut = [[None] * count if field is None else torch.tensor_split(field, count) for field in fields]
        return (StepInputs(*part) for part in zip(*cut, strict=True) if len(part[0]))

    def first(self, count: int) -> "StepInputs":
        """The first images alone, in memory of their own."""
        fields = (self.images, self.class_targets, self.token_ids, self.token_weights)
        return StepInputs(*(None if field is None else field[:count].clone() for field in fields))

    @property
    def places(self) -> int:
        """N; 1 where there are no token labels."""
        return 1 if self.token_ids is None else self.token_ids.shape[1]

    def totals(self) -> Tensor:
        """(2,) float64: images, and labelled mass (images where there are no token labels)."""
        images = torch.full((), float(len(self)), dtype=torch.float64, device=self.images.device)
        mass = images if self.token_weights is None else self.token_weights.sum(dtype=torch.float64)
        return torch.stack([images, mass])


@dataclass(frozen=True)
class Share:
    """What a part's means count in the whole step's: by images, and by labelled mass. Two scalars on the device.

    Times the number of processes, since gradients are averaged over these: so the sum over parts and the mean over
    processes is the mean over all images, or over all labelled mass, however they lie.
    """

    images: Tensor
    mass: Tensor
    labelled: Tensor

    @classmethod
    def of(cls, part: Inputs, totals: Tensor, processes: int) -> "Share":
        shares = processes * part.totals() / totals.clamp(min=torch.finfo(torch.float64).tiny)
        return cls(*shares.float(), (totals[1] / (totals[0] * part.places)).float())


class Objective(Protocol):
    """What is learned in a step. Both stages learn from `Batch` and `StepInputs`; other tasks have their own."""

    def inputs(self, batch: Any, random: StepRandom) -> Any:
        """Labels, augmentation and mixing of a whole step's images: `Inputs`."""
        ...

    def image_rows(self, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        """Images for TensorBoard of (a few) inputs, by name: uint8 (3, H, W) each."""
        ...

    def losses(self, model: nn.Module, inputs: Any, share: Share) -> dict[str, Tensor]:
        """Named parts of the loss, each times its share; "loss" is their sum and what is minimised. What else is
        there is shown, and has no gradient."""
        ...


def select_own(ids_BNm: Tensor, weights_BNm: Tensor, class_ids_B: Tensor) -> tuple[Tensor, Tensor]:
    """The same targets with weight 0 for each token whose first target is not the image's own class.

    The first target is the class that was drawn, or the best one. STL (arXiv 2401.03844, figure 2d) keeps tokens so.
    """
    return ids_BNm, weights_BNm * (ids_BNm[..., :1] == class_ids_B[:, None, None])


@torch.no_grad()
def token_scores(token_logits_BNK: Tensor, ids_BNm: Tensor, weights_BNm: Tensor, share: Share) -> dict[str, Tensor]:
    """How a student's tokens do, times their shares.

    token_accuracy: of the labelled mass, what lies on the class that the student finds likeliest; confidence: the
    probability of that class, mean over all tokens; labelled: weight that a token's labels have, mean over all tokens.
    """
    logits = token_logits_BNK.float()
    best = logits.max(dim=-1)
    hits = (weights_BNm * (ids_BNm == best.indices[..., None])).sum()
    return {
        "token_accuracy": hits / weights_BNm.sum().clamp(min=torch.finfo(torch.float32).tiny) * share.mass,
        "confidence": (best.values - logits.logsumexp(dim=-1)).exp().mean() * share.images,
        "labelled": weights_BNm.sum(dim=-1).mean() * share.images,
    }
