"""Dump jobs on little work: an untrained labeler, small images; as commands, under torchrun, or forked and killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import timm
import torch

from stl_offline.images.pack import pack
from stl_offline.models import WEIGHTS_NAME, ModelDescription, save_model
from tests.forks import COMMAND_LINE, Fork
from tests.training.conftest import CLASSES, write_stripes

SIDE = 32


def make_work(folder: Path, images: int = 15) -> dict[str, object]:
    """Images (so many of each of three classes) and a labeler in ``folder``: a dump's settings, without ``out``."""
    pack(write_stripes(folder / "images", images, 1), folder / "images.beton")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = timm.create_model("fan_micro_4_p8_token", num_classes=len(CLASSES), img_size=SIDE)
    description = ModelDescription("fan_micro_4_p8_token", CLASSES, SIDE, "labeler")
    save_model(folder / "labeler" / WEIGHTS_NAME, model.state_dict(), description)
    return {
        "data": str(folder / "images.beton"),
        "labeler": str(folder / "labeler"),
        "shards": 15,
        "top_k": 2,
        "batch_size": 2,
        "encoding": "q8",
        "workers": 1,
        "device": "cpu",
    }


def command(work: dict[str, object], out: Path, processes: int = 1, *more: str) -> list[str]:
    """The command line of a dump, under torchrun where it has several processes."""
    options = [word for name, value in work.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(processes), "-m"]
    return [*start, "stl_offline.cli", "dump-labels", *options, "--out", str(out), *more]


def environment(**more: str) -> dict[str, str]:
    """One thread a process, so that processes do not stand in each other's way."""
    return os.environ | {"OMP_NUM_THREADS": "1", "STL_OFFLINE_QUIET": "1"} | more


def run(work: dict[str, object], out: Path, processes: int = 1, *more: str, **env: str) -> subprocess.CompletedProcess:
    """Run a dump to its end."""
    words = command(work, out, 1, *more)[3:]
    fork = Fork(COMMAND_LINE, *words, env=env, processes=processes)
    texts = fork.communicate()
    return subprocess.CompletedProcess(words, fork.returncode, *texts)


def start(work: dict[str, object], out: Path, processes: int = 1, **env: str) -> subprocess.Popen | Fork:
    """Start a dump in the background; several processes as a user starts them, by torchrun's command."""
    if processes == 1:
        return Fork(COMMAND_LINE, *command(work, out)[3:], env=env)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command(work, out, processes), env=environment(**env), start_new_session=True, **quiet)


def tree(process: int) -> list[int]:
    """A process and all that it has started, directly or not."""
    found = [process]
    for each in found:
        try:
            found += map(int, Path(f"/proc/{each}/task/{each}/children").read_text().split())
        except OSError:
            continue
    return found


def kill_tree(process: int) -> None:
    """SIGKILL to a process and all that it has started."""
    for each in tree(process):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue


def content(path: Path) -> dict[str, bytes]:
    """Everything below a folder, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
