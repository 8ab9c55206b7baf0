"""Whether the processes of a job train the same run."""

import torch

from stl_offline.distributed import World, agree
from stl_offline.errors import TrainingError
from stl_offline.training.place import Progress
from stl_offline.training.run_folder import RunFolder


def check_together(folder: RunFolder, at: Progress, device: torch.device, world: World) -> None:
    """Every process trains the same run, and goes on from the same place.

    A machine may hold other pictures under the same path, or not see the run's folder and would start anew.

    Raises:
        TrainingError: they differ; in every process.
    """

    def same(*values: int) -> bool:
        return agree(torch.tensor(values, dtype=torch.float64, device=device), world)

    if not same(folder.digest):
        raise TrainingError(
            "the processes of this job have other settings, pictures or labels than each other; give all of them the "
            "same command, and the same files where it names them"
        )
    if not same(at.epoch, at.batch, at.step):
        raise TrainingError(
            f"the processes of this job find different states in {folder.path} (this one: step {at.step}); "
            "give a folder that all of them share"
        )
