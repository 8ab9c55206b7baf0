"""Start a training command as torchrun does, in real processes; and a job whose second process fails at a step, or does
not see the run's folder."""

import os
import subprocess
import sys

from stl_offline.cli.main import main
from stl_offline.training.engine import Trainer
from stl_offline.training.run_folder import RunFolder

BLIND = "STL_OFFLINE_TEST_BLIND"


def torchrun(
    *arguments: object, module: str = "stl_offline.cli", processes: int = 2, blind: bool = False
) -> subprocess.Popen:
    """Start ``torchrun --nproc-per-node N -m MODULE ARGUMENTS…``. ``blind``: of this module, without a fault."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({BLIND: "1"} if blind else {})
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


def open_nothing(self, *, resume, write):
    return open_folder(self, resume=resume, write=write) if write else None


if __name__ == "__main__":
    if BLIND in os.environ:
        open_folder, RunFolder.open = RunFolder.open, open_nothing
    else:
        original, Trainer._take_step = Trainer._take_step, fail_at_the_third_step
    sys.exit(main(sys.argv[1:]))
