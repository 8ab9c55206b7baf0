"""``--dry-run`` of fine-tuning: what a run would be, found out by a few steps on the run's own images."""

from collections.abc import Callable
from typing import Any

import numpy as np

from stl_offline.training.run_folder import RunFolder
from stl_offline.training.setup import TrainingRun
from stl_offline.training.step_timer import DryRun, StepTimer, measure
from stl_offline.training.steps import Objective
from stl_offline.transfer.backbone import Backbone
from stl_offline.transfer.pair_loader import ThreadedLoader


class DenseTimer(StepTimer):
    """Takes steps on the first images of the training data.

    Args:
        run: what is trained; loader: of its data.
        make_objective: gives what is learned by a run.
        pixels: of an image that the model sees.
    """

    def __init__(
        self, run: TrainingRun, loader: ThreadedLoader, make_objective: Callable[[Any], Objective], pixels: int
    ) -> None:
        self.loader, self.make_objective, self._pixels = loader, make_objective, pixels
        self.drawn = loader.draw(0)
        super().__init__(run)

    @property
    def pixels(self) -> int:
        return self._pixels

    def objective(self) -> Objective:
        return self.make_objective(self.run)

    def batch(self, count: int) -> Any:
        ids = np.arange(count) % len(self.loader.keys)
        loaded = [self.loader.load(number, self.drawn[number]) for number in ids.tolist()]
        return self.loader.collate(ids, loaded, 0)


def measure_dense(timer: DenseTimer, folder: RunFolder, backbone: Backbone, validation_images: int) -> DryRun:
    """What a run would be, whose folder is only looked at.

    Raises:
        InputError: the folder holds another run, or something else.
    """
    folder.look(timer.own.resume)
    strides = ", ".join(map(str, backbone.strides))
    images = len(timer.loader.keys)
    return measure(timer, images, validation_images, f"feature maps at strides {strides}", {})
