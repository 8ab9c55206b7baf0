"""Optimiser, schedule and averaged weights: timm's, set as the STL recipe sets them."""

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from stl_offline.config import TrainConfig

MIN_LR = 1e-6
WARMUP_LR = 1e-6


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW; no decay for biases, norms and what the model's ``no_weight_decay`` names.

    Fused: one pass over all tensors, several times as fast as one tensor after the other for small models on CPUs.
    """
    fused = {"fused": True} if next(model.parameters()).device.type in ("cpu", "cuda") else {}
    return timm.optim.create_optimizer_v2(model, opt="adamw", lr=config.lr, weight_decay=config.weight_decay, **fused)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from 1e-6, then a cosine to 1e-6, step by step. The warm-up takes a fifth of the run at most."""
    total = config.epochs * steps_per_epoch
    warmup = min(round(config.warmup_epochs * steps_per_epoch), total // 5)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, total - warmup),
        lr_min=min(MIN_LR, config.lr),
        warmup_t=warmup,
        warmup_lr_init=min(WARMUP_LR, config.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """Exponential moving average of the weights. Its decay warms up, so that short runs average too."""
    if not config.ema_decay:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
