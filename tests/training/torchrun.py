"""Start a training command as torchrun does, in real processes; and a job whose second process fails at a step."""

import os
import subprocess
import sys

from stl_offline.cli.main import main
from stl_offline.training.engine import Trainer


def torchrun(*arguments: object, module: str = "stl_offline.cli", processes: int = 2) -> subprocess.Popen:
    """Start ``torchrun --nproc-per-node N -m MODULE ARGUMENTS…``."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*start, "-m", module, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def fail_at_the_third_step(self, *arguments):
    if self.world.rank == 1 and self.at.step == 2:
        raise MemoryError("no memory is left on this one")
    return original(self, *arguments)


if __name__ == "__main__":
    original, Trainer._take_step = Trainer._take_step, fail_at_the_third_step
    sys.exit(main(sys.argv[1:]))
