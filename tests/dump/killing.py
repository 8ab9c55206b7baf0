"""Kills dump jobs at random moments, starts them again with another number of processes, and compares the bytes.

Processes are forked from one that has imported everything but computed nothing. So a try costs a second instead of ten;
with ``torchrun``, it is the command. With ``ray``, one actor at a time of a Ray cluster on this machine is killed.

    python -m tests.dump.killing --kills 20 --out runs/kills [--torchrun | --ray]
"""

import argparse
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stl_offline.config import DumpConfig
from stl_offline.dump import dump_labels, dump_on_ray
from tests.dump.dumping import content, kill_tree, make_work, start, tree


class ForkedJob:
    """A dump by ``processes`` forked processes."""

    def __init__(self, work: dict[str, object], out: Path, processes: int) -> None:
        self.running: list[int] = []
        for rank in range(processes):
            child = os.fork()
            if not child:
                self._dump(work, out, rank)
            self.running.append(child)
        self.codes: list[int] = []

    @staticmethod
    def _dump(work: dict[str, object], out: Path, rank: int) -> None:
        code = 1
        try:
            # Forks share the lock of progress bars, which one that is killed may hold.
            tqdm.set_lock(threading.RLock())
            os.environ["RANK"] = str(rank)
            dump_labels(DumpConfig(**work, out=str(out)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended by then."""
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            for child in list(self.running):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    self.running.remove(child)
                    self.codes.append(os.waitstatus_to_exitcode(status))
            time.sleep(0.002)
        return not self.running

    def kill(self) -> None:
        """SIGKILL to all that still run."""
        for child in self.running:
            os.kill(child, signal.SIGKILL)
        self.wait(60)


class TorchrunJob:
    """A dump as a command under torchrun (or alone)."""

    def __init__(self, work: dict[str, object], out: Path, processes: int) -> None:
        self.process = start(work, out, processes)

    def wait(self, seconds: float) -> bool:
        """Whether it has ended by then."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to torchrun and its processes."""
        kill_tree(self.process.pid)
        self.process.communicate()

    @property
    def codes(self) -> list[int]:
        return [self.process.returncode]


def survive(
    work: dict[str, object], folder: Path, expected: dict[str, bytes], kills: int, seed: int, job=ForkedJob, most=3
) -> Counter:
    """Kill until ``kills`` jobs were killed; every set that was finished on the way must be ``expected``.

    One in five is killed while it starts, the others after their first claim; each at a moment drawn from the time that
    this has taken at most so far. A job that ends before is not killed.
    """
    draw = np.random.default_rng(seed)
    counts: Counter = Counter()
    out = folder / "set"
    longest: dict[tuple[int, str], float] = {}
    while counts["kills"] < kills:
        processes = int(draw.integers(1, most + 1))
        phase = "starting" if draw.random() < 0.2 else "writing"
        before, half = progress(out), halves(out)
        begun = time.monotonic()
        running = job(work, out, processes)
        if phase == "writing":
            while progress(out) == before and not running.wait(0.005):
                pass
            note_longest(longest, (processes, "starting"), begun)
            begun = time.monotonic()
        ended = running.wait(float(draw.uniform(0, 1)) * longest.get((processes, phase), 120.0))
        if not ended:
            has_begun = progress(out) != before
            running.kill()
            counts["kills"] += 1
            counts[f"kills with {processes} processes"] += 1
            counts["kills while shards were written" if has_begun else "kills before the first claim"] += 1
            counts["kills that left half a file"] += not halves(out) <= half
            if not counts["kills"] % 20:
                print(dict(sorted(counts.items())), flush=True)
            continue
        if phase == "writing":
            note_longest(longest, (processes, "writing"), begun)
        assert set(running.codes) == {0}, f"a job that nobody killed ended with {running.codes}"
        found = content(out)
        assert found == expected, f"not the bytes of an undisturbed dump: {differing(found, expected)}"
        counts["sets finished, all with the same bytes"] += 1
        shutil.rmtree(out)
    # What the last kill left must end well, too.
    last = job(work, out, 2)
    assert last.wait(280) and set(last.codes) == {0}
    assert content(out) == expected
    counts["sets finished, all with the same bytes"] += 1
    return counts


def progress(out: Path) -> set[str]:
    """The claims and records of a set, which change once a job has begun to write."""
    partial = out / ".partial"
    return {path.name for path in (*partial.glob("claims/[!.]*"), *partial.glob("records/*/[!.]*"))}


def halves(out: Path) -> set[Path]:
    """Temporary files, which the next jobs leave to a worker that may still write them."""
    return {*out.glob(".*.tmp"), *out.glob(".partial/**/.*.tmp")}


def note_longest(longest: dict[tuple[int, str], float], what: tuple[int, str], begun: float) -> None:
    longest[what] = max(longest.get(what, 0.0), time.monotonic() - begun)


def survive_ray(
    work: dict[str, object], folder: Path, expected: dict[str, bytes], kills: int, seed: int, nodes: int
) -> Counter:
    """Kill so many actors of a cluster of so many nodes; every set must be ``expected``."""
    import ray
    from ray.cluster_utils import Cluster

    # Ray gives its workers the lowest priority but four: beside other work, actors would not even start.
    os.environ |= {"RAY_worker_niceness": "0"}
    draw = np.random.default_rng(seed)
    counts: Counter = Counter()
    out = folder / "set"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    for _ in range(nodes - 1):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        while counts["kills"] < kills:
            with ThreadPoolExecutor(1) as pool:
                dump = pool.submit(dump_on_ray, DumpConfig(**work, out=str(out)))
                while not wait([dump], float(draw.uniform(0, 1.5))).done:
                    actors = [pid for pid in tree(os.getpid()) if title(pid).startswith("ray::ShardActor")]
                    if actors and counts["kills"] < kills:
                        os.kill(int(draw.choice(actors)), signal.SIGKILL)
                        counts["kills"] += 1
                counts["images labelled"] += dump.result().labelled
            found = content(out)
            assert found == expected, f"not the bytes of an undisturbed dump: {differing(found, expected)}"
            counts["sets finished, all with the same bytes"] += 1
            print(dict(sorted(counts.items())), flush=True)
            shutil.rmtree(out)
    finally:
        ray.shutdown()
        cluster.shutdown()
    return counts


def title(process: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """The names of files that are not the same, or not there."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=3, help="at most")
    parser.add_argument("--torchrun", action="store_true", help="the command itself, not forks")
    parser.add_argument("--ray", action="store_true", help="actors of a cluster of --processes nodes, 300 images each")
    options = parser.parse_args()
    os.environ |= {"STL_OFFLINE_QUIET": "1", "OMP_NUM_THREADS": "1"}
    # OpenMP's threads, of which this process would start some, do not survive a fork: its children would hang.
    torch.set_num_threads(1)
    folder = Path(options.out)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    work = make_work(folder / "work", 100) | {"shards": 100} if options.ray else make_work(folder / "work")
    alone = ForkedJob(work, folder / "alone", 1)
    assert alone.wait(280) and alone.codes == [0]
    expected = content(folder / "alone")
    assert len(expected) >= asdict(DumpConfig(**work, out=""))["shards"] + 1
    job = TorchrunJob if options.torchrun else ForkedJob
    started = time.monotonic()
    if options.ray:
        counts = survive_ray(work, folder, expected, options.kills, options.seed, options.processes)
    else:
        counts = survive(work, folder, expected, options.kills, options.seed, job, options.processes)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    print(f"{time.monotonic() - started:,.0f} s", flush=True)
    # numba's thread pool, which importing made, waits at exit for threads that forks have left without tasks.
    os._exit(0)


if __name__ == "__main__":
    main()
