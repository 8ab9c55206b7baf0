"""What runs in processes of its own, where FFCV may be absent.

torchrun … -m tests.gpu.process OUT BACKEND DEVICE BATCH    one of several that train together
python -m tests.gpu.process study …                         the study (`tests.gpu.study`)
python -m tests.gpu.process transfer …                      its students, fine-tuned (`tests.benchmarks.transfer_study`)
"""

import sys

import torch

from tests.gpu.absent import stand_in_for_ffcv


def train_together(out: str, backend: str, device: str, batch: str) -> None:
    """What `tests.gpu.right.processes` starts under torchrun."""
    from stl_offline.config import LabelerConfig
    from stl_offline.distributed import join_world, leaving_world
    from tests.gpu.right import train

    with leaving_world():
        world = join_world(torch.device(device), backend)
        settings = {"data": "memory", "img_size": 32, "epochs": 2, "mixup": 0.8, "cutmix": 1.0, "random_erase": 0.5}
        settings |= {"auto_augment": "rand-m9-mstd0.5-inc1", "amp": "none", "batch_size": int(batch)}
        summary = train(LabelerConfig(out=out, **settings), torch.device(device), world)
        if world.is_first:
            print(summary["loss"])


stand_in_for_ffcv()

if __name__ == "__main__":
    if sys.argv[1] == "study":
        from tests.gpu.study import main

        main(sys.argv[2:])
    elif sys.argv[1] == "transfer":
        del sys.argv[1]
        from tests.benchmarks import transfer_study

        transfer_study.main()
    else:
        train_together(*sys.argv[1:])
