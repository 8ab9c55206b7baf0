"""One of several processes that train together: what `tests.gpu.right.processes` starts under torchrun.

torchrun … -m tests.gpu.process OUT BACKEND DEVICE BATCH
"""

import sys

import torch

from tests.gpu.absent import stand_in_for_ffcv

if __name__ == "__main__":
    stand_in_for_ffcv()
    from stl_offline.config import LabelerConfig
    from stl_offline.distributed import join_world, leaving_world
    from tests.gpu.right import train

    out, backend, device, batch = sys.argv[1:]
    with leaving_world():
        world = join_world(torch.device(device), backend)
        settings = {"data": "memory", "img_size": 32, "epochs": 2, "mixup": 0.8, "cutmix": 1.0, "random_erase": 0.5}
        settings |= {"auto_augment": "rand-m9-mstd0.5-inc1", "amp": "none", "batch_size": int(batch)}
        summary = train(LabelerConfig(out=out, **settings), torch.device(device), world)
        if world.is_first:
            print(summary["loss"])
