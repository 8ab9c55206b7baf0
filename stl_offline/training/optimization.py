"""Optimiser, schedule and averaged weights: timm's, set as the STL recipe sets them."""

import timm.optim
import torch
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from stl_offline.config import TrainConfig

MIN_LR = 1e-6
WARMUP_LR = 1e-6


def learning_rate(config: TrainConfig, processes: int) -> float:
    """The largest learning rate: as set, or scaled from ``lr_batch`` images a step to those of all processes."""
    if not config.lr_batch:
        return config.lr
    return config.lr * config.batch_size * config.accumulate * processes / config.lr_batch


def make_optimizer(model: nn.Module, config: TrainConfig, lr: float) -> torch.optim.Optimizer:
    """AdamW; no decay for biases, norms and what the model's ``no_weight_decay`` names.

    Fused: one pass over all tensors, several times as fast as one tensor after the other for small models on CPUs.
    """
    fused = {"fused": True} if next(model.parameters()).device.type in ("cpu", "cuda") else {}
    return timm.optim.create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=config.weight_decay, **fused)


def warmup_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Steps of rising learning rate: as set, but a fifth of the run at most."""
    return min(round(config.warmup_epochs * steps_per_epoch), config.epochs * steps_per_epoch // 5)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up from 1e-6, then a cosine to 1e-6, step by step."""
    lr = optimizer.param_groups[0]["lr"]
    warmup = warmup_steps(config, steps_per_epoch)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(1, config.epochs * steps_per_epoch - warmup),
        lr_min=min(MIN_LR, lr),
        warmup_t=warmup,
        warmup_lr_init=min(WARMUP_LR, lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """Exponential moving average of the weights.

    Its decay warms up as 1 − 9 / (9 + step), so that short runs average, too: over the last ninth of the steps so far,
    until that is what the decay itself averages over (0.99992: after 112,500 steps).
    """
    if not config.ema_decay:
        return None
    return ModelEmaV3(model, decay=config.ema_decay, use_warmup=True, warmup_gamma=9.0, warmup_power=1.0)
