"""Whether the processes of a job train the same run."""

import torch

from stl_offline.config import TrainConfig
from stl_offline.distributed import World, agree
from stl_offline.errors import TrainingError
from stl_offline.training.place import Progress
from stl_offline.training.run_folder import RunFolder


def check_same_run(folder: RunFolder, config: TrainConfig, device: torch.device, world: World) -> None:
    """Every process has the same settings and data: a machine may hold other pictures under the same path.

    Raises:
        TrainingError: they differ; in every process.
    """
    # When they measure shapes no result, but they have to do it together.
    if not _same([folder.digest, config.val_every], device, world):
        raise TrainingError(
            "the processes of this job have other settings, pictures or labels than each other; give all of them the "
            "same command, and the same files where it names them"
        )


def check_same_place(folder: RunFolder, at: Progress, device: torch.device, world: World) -> None:
    """Every process goes on from the same place: one that does not see the run's folder would start anew.

    Raises:
        TrainingError: they differ; in every process.
    """
    if not _same([at.epoch, at.batch, at.step], device, world):
        raise TrainingError(
            f"the processes of this job find different states in {folder.path} (this one: step {at.step}); "
            "give a folder that all of them share"
        )


def _same(values: list[int], device: torch.device, world: World) -> bool:
    return agree(torch.tensor(values, dtype=torch.float64, device=device), world)
