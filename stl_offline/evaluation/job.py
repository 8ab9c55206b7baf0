"""``stl-offline evaluate``: how well a trained model does on other images."""

from dataclasses import asdict
from typing import Any

import torch

from stl_offline.config import EvaluateConfig
from stl_offline.device import pick_amp, pick_device, pick_workers
from stl_offline.evaluation.scoring import evaluate_model, match_classes, scoring_loader
from stl_offline.geometry import center_views
from stl_offline.images.pack import ensure_beton
from stl_offline.models import load_model


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """``stl-offline evaluate``: score a trained model on a folder, tars or a .beton."""
    device = pick_device(config.device)
    model, description = load_model(config.checkpoint)
    beton = ensure_beton(config.data, skip_broken=config.skip_broken)
    class_map = match_classes(beton, description.class_names, config.checkpoint)
    model = model.to(device).to(memory_format=torch.channels_last)
    loader = scoring_loader(
        model,
        description,
        beton,
        device=device,
        batch_size=config.batch_size,
        workers=pick_workers(config.workers),
        side=config.img_size,
    )
    views = center_views(beton.heights, beton.widths, config.crop_pct)
    return asdict(evaluate_model(model, loader, views, class_map, pick_amp(config.amp, device)))
