"""Stage 2, ``stl-offline train-student``: a student beside whose class labels stand token labels.

STL (arXiv 2401.03844), section 3.2: CE(class logits, y) + w · mean over tokens of CE(token logits, token label).
The labels come from a label set (dumped once), from the labeler in every step (the released code's way), or nowhere.
"""

import contextlib
from typing import Any

from torch import Tensor, nn

from stl_offline.augment import mix_class_targets, mix_images, mix_token_targets
from stl_offline.config import StudentConfig
from stl_offline.device import autocast
from stl_offline.distributed import leaving_world
from stl_offline.loader import Batch
from stl_offline.losses import soft_cross_entropy, token_cross_entropy
from stl_offline.training.engine import run_stage
from stl_offline.training.label_sources import LabelSource, check_labels, open_labels
from stl_offline.training.setup import Stage, prepare
from stl_offline.training.steps import Share, StepInputs, StepRandom, select_own, token_scores
from stl_offline.training.watch import image_rows


def train_student(config: StudentConfig) -> dict[str, Any]:
    """Train a student; gives back the summary that the run's folder holds. Under torchrun, as one process of it.

    Raises:
        StlError: bad input, labels that do not belong to the images, or a loss that is not finite.
    """
    with leaving_world():
        check_labels(config)
        stage = prepare(config, "student")
        with contextlib.closing(open_labels(config, stage)) as source:
            objective = StudentObjective(stage, source)
            return run_stage(stage, objective, source.plan, source.identity(), source.loader_labels())


class StudentObjective:
    """Class loss, and each token's loss against its label."""

    def __init__(self, stage: Stage, source: LabelSource) -> None:
        self.stage, self.source = stage, source
        self._targets_per_token = 0

    def inputs(self, batch: Batch, random: StepRandom) -> StepInputs:
        """From a batch: token targets, augmentation, mix of pixels and of both labels."""
        stage = self.stage
        tokens = self.source.tokens(batch, random)
        if tokens is not None and stage.config.select == "own":
            tokens = select_own(*tokens, batch.class_ids)
        if tokens is not None:
            self._targets_per_token = tokens[0].shape[2]
        images = stage.augment(batch)
        mix = stage.draw_mix(images, random)
        if mix is not None:
            images = mix_images(images, mix)
            if tokens is not None:
                tokens = mix_token_targets(*tokens, self.source.grid, mix)
        answers = self.source.class_answers(batch)
        classes, smoothing = len(stage.train.class_names), stage.config.smoothing
        targets = mix_class_targets(batch.class_ids, classes, smoothing, mix, answers)
        return StepInputs(images, targets, *(tokens or ()))

    image_rows = staticmethod(image_rows)

    def losses(self, model: nn.Module, inputs: StepInputs, share: Share) -> dict[str, Tensor]:
        config = self.stage.config
        with autocast(self.stage.device, self.stage.amp):
            class_logits, token_logits = model(inputs.images)
        class_loss = soft_cross_entropy(class_logits, inputs.class_targets) * share.images
        if inputs.token_ids is None:
            return {"loss": class_loss, "class_loss": class_loss}
        labels = (inputs.token_ids, inputs.token_weights)
        # The last target of a token, and of its partner's where images were mixed.
        step = self._targets_per_token
        ghosts = range(step - 1, labels[0].shape[2], step) if config.residual == "ghost" else ()
        token_loss = token_cross_entropy(token_logits, *labels, config.smoothing, ghosts=ghosts) * share.mass
        if config.token_norm == "tokens":
            token_loss = token_loss * share.labelled
        return {
            "loss": class_loss + config.token_weight * token_loss,
            "class_loss": class_loss,
            "token_loss": token_loss,
            **token_scores(token_logits, *labels, share),
        }
