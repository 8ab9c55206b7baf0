"""Stage 1, ``stl-offline train-labeler``: a FAN whose tokens learn to classify with no label of their own.

STL (arXiv 2401.03844), section 3.1: CE(class logits, y) + w · CE(mean of the token logits, y).
"""

from typing import Any

from torch import Tensor, nn

from stl_offline.config import LabelerConfig
from stl_offline.device import autocast
from stl_offline.loader import Batch
from stl_offline.losses import soft_cross_entropy
from stl_offline.mixing import draw_mix, mix_class_targets, mix_images
from stl_offline.training.engine import StepRandom, Trainer
from stl_offline.training.setup import Stage, prepare


def train_labeler(config: LabelerConfig) -> dict[str, Any]:
    """Train a token labeler; gives back the summary that the run's folder holds.

    Raises:
        StlError: bad input, or a loss that is not finite.
    """
    stage = prepare(config, "labeler")
    folder = stage.run_folder()
    complete = folder.summary() if config.resume else None
    if complete is not None:
        return complete
    state = folder.open(resume=config.resume, write=stage.world.is_first)

    def plan(epoch: int) -> dict[str, Any]:
        return {"views": stage.random_views(epoch)}

    def loss(model: nn.Module, batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        return labeler_step(stage, model, batch, random)

    trainer = Trainer(
        config,
        folder,
        stage.model,
        stage.train_loader(),
        loss,
        plan,
        stage.validation(),
        stage.description,
        stage.device,
        stage.world,
    )
    return trainer.fit(state)


def labeler_step(stage: Stage, model: nn.Module, batch: Batch, random: StepRandom) -> dict[str, Tensor]:
    """From a batch to stage 1's loss: jitter, mix, forward, CE of the class head and of the mean token."""
    images = stage.jitter(batch.images, random)
    mix = draw_mix(len(images), *images.shape[2:], stage.mix, random.numpy) if stage.mix.enabled else None
    if mix is not None:
        images = mix_images(images, mix)
    targets = mix_class_targets(batch.class_ids, len(stage.train.class_names), stage.config.smoothing, mix)
    with autocast(stage.device, stage.amp):
        class_logits, token_logits = model(images)
    class_loss = soft_cross_entropy(class_logits, targets)
    token_loss = soft_cross_entropy(token_logits.float().mean(dim=1), targets)
    total = class_loss + stage.config.token_weight * token_loss
    return {"loss": total, "class_loss": class_loss, "token_loss": token_loss}
