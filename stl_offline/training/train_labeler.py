"""Stage 1, ``stl-offline train-labeler``: a FAN whose tokens learn to classify with no label of their own.

STL (arXiv 2401.03844), section 3.1: CE(class logits, y) + w · CE(pooled token logits, y).
STL pools by the mean; `stl_offline.losses.pool_tokens` has the other way.
"""

from typing import Any

import torch
from torch import Tensor, nn

from stl_offline.augment import mix_class_targets, mix_images
from stl_offline.config import LabelerConfig
from stl_offline.device import autocast
from stl_offline.distributed import leaving_world
from stl_offline.loader import Batch
from stl_offline.losses import pool_tokens, soft_cross_entropy
from stl_offline.training.engine import run_stage
from stl_offline.training.setup import Stage, prepare
from stl_offline.training.steps import Share, StepInputs, StepRandom
from stl_offline.training.watch import image_rows


def train_labeler(config: LabelerConfig) -> dict[str, Any]:
    """Train a token labeler; gives back the summary that the run's folder holds. Under torchrun, as one process of it.

    Raises:
        StlError: bad input, or a loss that is not finite.
    """
    with leaving_world():
        stage = prepare(config, "labeler")
        return run_stage(stage, LabelerObjective(stage), stage.random_plan)


class LabelerObjective:
    """Class loss, and class loss of the pooled tokens."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def inputs(self, batch: Batch, random: StepRandom) -> StepInputs:
        stage = self.stage
        images = stage.augment(batch)
        mix = stage.draw_mix(images, random)
        if mix is not None:
            images = mix_images(images, mix)
        targets = mix_class_targets(batch.class_ids, len(stage.train.class_names), stage.config.smoothing, mix)
        return StepInputs(images, targets)

    image_rows = staticmethod(image_rows)

    def losses(self, model: nn.Module, inputs: StepInputs, share: Share) -> dict[str, Tensor]:
        stage = self.stage
        with autocast(stage.device, stage.amp):
            class_logits, token_logits = model(inputs.images)
        token_logits = token_logits.float()
        class_loss = soft_cross_entropy(class_logits, inputs.class_targets) * share.images
        token_loss = (
            soft_cross_entropy(pool_tokens(token_logits, stage.config.token_pool), inputs.class_targets) * share.images
        )
        return {
            "loss": class_loss + stage.config.token_weight * token_loss,
            "class_loss": class_loss,
            "token_loss": token_loss,
            **_token_scores(token_logits, inputs.class_targets, share),
        }


@torch.no_grad()
def _token_scores(token_logits_BNK: Tensor, targets_BK: Tensor, share: Share) -> dict[str, Tensor]:
    """token_accuracy: share of tokens that say the image's (larger) class; confidence: of the likeliest class."""
    best = token_logits_BNK.max(dim=-1)
    hits = best.indices == targets_BK.argmax(dim=-1, keepdim=True)
    return {
        "token_accuracy": hits.float().mean() * share.images,
        "confidence": (best.values - token_logits_BNK.logsumexp(dim=-1)).exp().mean() * share.images,
    }
