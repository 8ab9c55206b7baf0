"""Fuzzing: ``python -m tests.fuzz.run --minutes 60`` (or ``--cases 20000`` of each target) from the repository's root.

Every case must end with the same data or a clean refusal (StlError). A case is its target and its number: ``--target
"labels zarr q8" --first 123 --cases 1`` runs one again. Cases run in a process of their own,
with a limit on its memory; one that kills it or takes more than ten seconds is recorded, and a new process goes on.
"""

import argparse
import collections
import contextlib
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from stl_offline.errors import StlError
from tests.fuzz.work import TARGETS

MOST_SECONDS = 10
_START_SECONDS = 120
# Beyond what the process takes before its first case.
MEMORY_BYTES = 1 << 30
KINDS = ("same", "changed", "refused", "other", "death", "hang")


@dataclass
class Result:
    """How many cases of a target ended how; ``faults``: for each kind of fault, the number of a case that shows it."""

    counts: collections.Counter = field(default_factory=collections.Counter)
    faults: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class Worker:
    """A process that runs cases one at a time; a new one takes its place where a case has ended it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, target: str, number: int, patience: float) -> tuple[str, str]:
        """How a case ended; ``number`` -1 only makes the target's files."""
        try:
            self._pipe.send((target, number))
            if self._pipe.poll(patience):
                return self._pipe.recv()
            return "hang", f"more than {patience:g} seconds"
        except (EOFError, OSError):
            self._process.join(5)
            return "death", f"exit code {self._process.exitcode}"

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()


def attack(targets: list[str], first: int, cases: int, seconds: float, least: int = 0) -> dict[str, Result]:
    """Run cases [first, first + cases) of each target, or as many as start within its share of ``seconds``.

    ``least``: how many run in any case.
    """
    results: dict[str, Result] = {}
    worker = Worker()
    for target in targets:
        result = results[target] = Result()
        if worker.ask(target, -1, _START_SECONDS)[0] != "ready":
            raise RuntimeError(f"the files of the target {target} cannot be made")
        begun = time.monotonic()
        number = first
        while number < first + cases and (number < first + least or time.monotonic() < begun + seconds / len(targets)):
            kind, text = worker.ask(target, number, MOST_SECONDS)
            _record(result, kind, text, number)
            number += 1
            if kind in ("death", "hang"):
                worker.close()
                worker = Worker()
                worker.ask(target, -1, _START_SECONDS)
        result.seconds = time.monotonic() - begun
    worker.close()
    return results


def _record(result: Result, kind: str, text: str, number: int) -> None:
    result.counts[kind] += 1
    if kind in KINDS[3:]:
        result.faults.setdefault(f"{kind}: {text}", number)


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name, contextlib.suppress(EOFError, BrokenPipeError):
        folder = Path(name)
        attacked: dict[str, object] = {}
        while True:
            target, number = pipe.recv()
            if target not in attacked:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
                (folder / target).mkdir()
                attacked[target] = TARGETS[target](folder / target)
            if number < 0:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                limit = pages * resource.getpagesize() + MEMORY_BYTES
                resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
                pipe.send(("ready", ""))
                continue
            place = folder / "case"
            place.mkdir()
            pipe.send(_one(attacked[target], random.Random(f"{target} {number}"), place))
            shutil.rmtree(place)


def _one(attacked: object, draw: random.Random, place: Path) -> tuple[str, str]:
    try:
        return attacked.case(draw, place), ""
    except StlError as error:
        if "MemoryError" in str(error):
            return "other", "a refusal only after the memory was full"
        try:
            str(error).encode()
        except UnicodeError:
            return "other", f"{type(error).__name__} whose message cannot be printed"
        return "refused", ""
    except Exception as error:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "stl_offline" in frame.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the fuzzer"
        return "other", f"{type(error).__name__} in {where}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="in all, shared among the targets (without their start)"
    )
    parser.add_argument("--cases", type=int, default=10**9, help="of each target at most")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="default: all")
    options = parser.parse_args()

    results = attack(options.target or list(TARGETS), options.first, options.cases, 60 * options.minutes)
    print("| target | cases | " + " | ".join(KINDS) + " |\n|---|" + "---:|" * (len(KINDS) + 1))
    for name, result in results.items():
        numbers = [result.counts.total(), *(result.counts[kind] for kind in KINDS)]
        print(f"| {name} | " + " | ".join(f"{number:,}" for number in numbers) + " |")
    for name, result in results.items():
        for fault, number in result.faults.items():
            print(f'{name}: {fault}; again: --target "{name}" --first {number} --cases 1')
    return int(any(result.faults for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
