"""One process or many: the little of torch.distributed that training and dumping need.

Under ``torchrun`` every process finds its rank in the environment; without it there is one process.
"""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among ``size`` of them."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join_world(device: torch.device) -> World:
    """Join the processes that torchrun started (nccl on GPUs, gloo on CPUs); alone, do nothing."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(dist.get_rank(), size)


def leave_world() -> None:
    """Leave the group, so that the processes end without a warning."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_world(values: torch.Tensor, world: World) -> torch.Tensor:
    """Element-wise sum over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def wait_for_world(world: World) -> None:
    """Return when every process has come here."""
    if world.size > 1:
        dist.barrier()
