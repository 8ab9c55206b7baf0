"""What measures a model while it trains."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from stl_offline.distributed import World
from stl_offline.evaluation.scoring import Scores, evaluate_model
from stl_offline.loader import TokenLoader


@dataclass
class Validation:
    """Scores a model on the validation images; each process on its share of them."""

    loader: TokenLoader
    views: np.ndarray
    class_map: np.ndarray
    amp: torch.dtype | None
    world: World

    def __call__(self, model: nn.Module, between: Callable[[], None]) -> Scores:
        """``between`` is called after every batch; what it raises ends the measuring."""
        return evaluate_model(model, self.loader, self.views, self.class_map, self.amp, self.world, between)
