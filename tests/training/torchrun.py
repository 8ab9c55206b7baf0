"""Start a training command as torchrun does, in real processes; and jobs whose second process has a fault."""

import os
import subprocess
import sys
from typing import Literal

import torch

from stl_offline.cli.main import main
from stl_offline.distributed import agree
from stl_offline.training.engine import Trainer
from stl_offline.training.run_folder import RunFolder
from stl_offline.training.train_student import StudentObjective
from tests.forks import Fork

FAULT = "STL_OFFLINE_TEST_FAULT"


def torchrun(
    *arguments: object, fault: Literal["memory", "nan", "blind", "other", "settings"] | None = None
) -> subprocess.Popen | Fork:
    """Start ``torchrun --nproc-per-node 2 -m stl_offline.cli ARGUMENTS…``, or the same with a fault, then as a fork.

    fault: the second process fails for want of memory at its third step (memory), has a loss there that is not a number
        (nan), does not see the run's folder (blind), has other settings (settings), or measures another model
        than the first one (other), which the command itself must not let happen.
    """
    if fault:
        return Fork(__file__, *arguments, env={FAULT: fault}, processes=2, merge=True)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*start, "-m", "stl_offline.cli", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def want_memory(self, *arguments):
    if self.world.rank == 1 and self.at.step == 2:
        raise MemoryError("no memory is left on this one")
    return take_step(self, *arguments)


def lose_the_loss(self, model, inputs, share):
    found = losses(self, model, inputs, share)
    lose_the_loss.calls += 1
    spoilt = os.environ["RANK"] == "1" and lose_the_loss.calls == 3
    return found | {"loss": found["loss"] * float("nan")} if spoilt else found


def open_nothing(self, *, resume, write):
    return open_folder(self, resume=resume, write=write) if write else None


def compare(self, stop):
    for model in (self.model, self.step.average.module):
        statistics = torch.cat([value.double().flatten() for value in model.buffers()])
        assert agree(statistics, self.world), "the processes measure different models"
    return measure(self, stop)


if __name__ == "__main__":
    match os.environ[FAULT]:
        case "memory":
            take_step, Trainer._take_step = Trainer._take_step, want_memory
        case "nan":
            lose_the_loss.calls = 0
            losses, StudentObjective.losses = StudentObjective.losses, lose_the_loss
        case "other":
            measure, Trainer._measure = Trainer._measure, compare
        case "settings":
            sys.argv += ["--flip", "0"] if os.environ["RANK"] == "1" else []
        case "blind":
            open_folder, RunFolder.open = RunFolder.open, open_nothing
    sys.exit(main(sys.argv[1:]))
