"""Top-1 and top-5 of the class head, and top-1 of the mean token.

B: batch, N: tokens, K: classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stl_offline.device import autocast
from stl_offline.distributed import World, sum_over_world
from stl_offline.errors import JoinError
from stl_offline.images.beton import Beton
from stl_offline.loader import TokenLoader
from stl_offline.models import ModelDescription


@dataclass(frozen=True)
class Scores:
    """Shares of the samples, in [0, 1]. ``token_top1`` is None for a model without a token head."""

    samples: int
    top1: float
    top5: float
    token_top1: float | None


def scoring_loader(
    model: nn.Module,
    description: ModelDescription,
    beton: Beton,
    *,
    device: torch.device,
    batch_size: int,
    workers: int,
    side: int = 0,
) -> TokenLoader:
    """All images in their order, as a trained model takes them; side 0: of the pixels that it was trained on."""
    side = side or description.img_size
    return TokenLoader(
        beton,
        (side, side),
        batch_size,
        workers=workers,
        seed=0,
        device=device,
        mean=model.pretrained_cfg["mean"],
        std=model.pretrained_cfg["std"],
        shuffle=False,
        interpolation=description.interpolation,
    )


@torch.inference_mode()
def evaluate_model(
    model: nn.Module,
    loader: TokenLoader,
    views: np.ndarray,
    class_map: np.ndarray,
    amp: torch.dtype | None = None,
    world: World | None = None,
    between: Callable[[], None] | None = None,
) -> Scores:
    """Score a model on every sample of a loader.

    Args:
        model: gives class logits (B, K), or (class logits, token logits (B, N, K)).
        views: (n, 6), the view of each sample.
        class_map: (classes of the images,) int64, each one's number in the model's class list.
        between: called after every batch; what it raises ends the scoring.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=loader.device)
    mapping = torch.from_numpy(class_map).to(loader.device)
    has_tokens = False
    for batch in loader.epoch(0, views):
        with autocast(loader.device, amp):
            output = model(batch.images)
        class_logits, token_logits = output if isinstance(output, tuple) else (output, None)
        truth = mapping[batch.class_ids]
        best = class_logits.float().topk(min(5, class_logits.shape[1])).indices
        counts[0] += len(truth)
        counts[1] += (best[:, 0] == truth).sum()
        counts[2] += (best == truth[:, None]).sum()
        if token_logits is not None:
            has_tokens = True
            counts[3] += (token_logits.float().mean(dim=1).argmax(dim=1) == truth).sum()
        if between is not None:
            between()
    model.train(was_training)
    samples, top1, top5, token_top1 = sum_over_world(counts, world or World()).tolist()
    samples = int(samples)
    return Scores(samples, top1 / samples, top5 / samples, token_top1 / samples if has_tokens else None)


def match_classes(beton: Beton, class_names: tuple[str, ...], whose: str) -> np.ndarray:
    """Each class of the images as its number in ``class_names``: int64 (classes of the images,).

    Raises:
        JoinError: the images have classes that the list does not hold.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    unknown = [name for name in beton.class_names if name not in numbers]
    if unknown:
        raise JoinError(
            f"{len(unknown)} of the {len(beton.class_names)} classes of {beton.path} are not among the "
            f"{len(class_names)} of {whose} (such as {', '.join(map(repr, unknown[:3]))}); use the same classes"
        )
    return np.array([numbers[name] for name in beton.class_names], dtype=np.int64)
