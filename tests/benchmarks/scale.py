"""Time and memory of work on whole label sets, from ten thousand to ten million images: flat for each image, or not.

    python -m tests.benchmarks.scale --labels runs/in1k/labels --out runs/scale

Synthetic sets with a real set's statistics on a small grid (2 × 2, k = 2), so that what is measured is the keys, the
shard table and the bookkeeping; 1,000 images per shard, so that the largest has 10,000 shards. Each size in a process
of its own; time is processor time, and memory the most that a step takes of its own, without mapped files. The largest
takes eight minutes of a core, 3 GB of disk and 4 GB of memory.

    python -m tests.benchmarks.scale --bookkeeping

Without labels: what the shards of a dump cost beside their labels. Workers (threads) claim, commit and record shards of
a few bytes in a store in memory, the last one writes the manifest, and it is opened. Requests are counted by kind; a
store lists 1,000 names at a time, so that a listing of n names counts as n / 1,000 requests, rounded up.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from fsspec.implementations.memory import MemoryFileSystem

from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.join import join
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.merge import merge
from stl_offline.labels.store import MANIFEST, storage
from stl_offline.labels.verify import verify
from stl_offline.labels.writer import LabelSetWriter
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.resampled import key, make_set
from tests.labels.synthetic import make_spec

PER_SHARD = 1000
LISTED = 1000  # names in an answer of S3
STEPS = ("manifest", "merge", "verify", "join", "cache")


def measure(source: str, folder: Path, images: int) -> dict[str, tuple[float, float]]:
    """Processor seconds and MiB of each step on a set of ``images``."""
    shutil.rmtree(folder, ignore_errors=True)
    half, shards = images // 2, images // PER_SHARD
    smaller = {"grid": (2, 2), "top_k": 2}
    first = make_set(source, folder / "first", half, shards // 2, **smaller)
    second = make_set(source, folder / "second", half, shards // 2, start=half, **smaller)
    found: dict[str, tuple[float, float]] = {}

    def step(name: str, work) -> None:
        with PeakMemory() as peak:
            started = time.process_time()
            work()
            seconds = time.process_time() - started
        found[name] = (seconds, peak.mib)
        print(f"{images:,} images: {name} {seconds:.1f} s, {peak.mib:,.0f} MiB", file=sys.stderr, flush=True)

    step("merge", lambda: merge([first, second], folder / "merged"))
    data = (folder / "merged" / MANIFEST).read_bytes()
    step("manifest", lambda: Manifest.from_bytes(data).to_bytes())
    label_set = open_label_set(folder / "merged")
    step("verify", lambda: verify(label_set))
    draw = np.random.default_rng(0).permutation(images)
    keys = [key(position) for position in draw.tolist()]
    hashes = draw.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    names = label_set.spec.class_names
    step("join", lambda: join(label_set, keys, hashes, names))
    step("cache", lambda: build_token_cache(label_set, keys, hashes, names, folder=folder / "cache"))
    return found


def counted_storage(counts: Counter) -> None:
    """Let every store count its requests."""
    persist, listing, remove = (getattr(storage.ObjectStorage, name) for name in ("_persist", "_list", "remove"))

    def count(self, what, *arguments):
        counts[what.partition(" ")[0]] += 1
        return persist(self, what, *arguments)

    def count_listing(self, folder):
        found = listing(self, folder)
        counts["list"] += max(0, math.ceil(len(found) / LISTED) - 1)
        return found

    def count_removal(self, name):
        """Of a folder: its files are listed, and then removed 1,000 at a time."""
        counts["list"] += max(1, math.ceil(len(self.filesystem[0].find(self._path(name))) / LISTED))
        remove(self, name)

    def info(self, path, **_):
        """fsspec's own looks through all files for a folder of that name."""
        path = self._strip_protocol(path)
        if path not in self.store:
            raise FileNotFoundError(path)
        return {"name": path, "size": self.store[path].size, "type": "file"}

    storage.ObjectStorage._persist, storage.ObjectStorage._list = count, count_listing
    storage.ObjectStorage.remove = count_removal
    MemoryFileSystem.info = info


def bookkeep(shards: int, workers: int, counts: Counter) -> dict[str, float]:
    """Processor seconds of all workers and of the end, and requests, of a dump of so many shards."""
    place, spec = f"memory://{uuid.uuid4().hex}/labels", make_spec(samples=shards * PER_SHARD)
    counts.clear()
    ended: list[float] = []

    def work() -> None:
        with LabelSetWriter(place, spec, shards) as writer:
            writer.unrecorded()  # as a dump does, to show how much is left
            for index in writer.claim_shards():
                writer.write_encoded(index, b"%d" % index)
                time.sleep(0.005 * workers)  # in place of labelling, which takes far longer
            started = time.thread_time()
            writer.finish()
            ended.append(time.thread_time() - started)

    with PeakMemory() as peak:
        started = time.process_time()
        with ThreadPoolExecutor(workers) as pool:
            for done in [pool.submit(work) for _ in range(workers)]:
                done.result()
        seconds = time.process_time() - started
    found = dict(counts) | {"seconds": seconds, "finish": max(ended), "mib": peak.mib}
    started = time.process_time()
    assert len(open_label_set(place)) == shards * PER_SHARD
    found["open"] = time.process_time() - started
    storage.open_storage(place).filesystem[0].store.clear()
    return found


def bookkeeping(sizes: list[int]) -> None:
    counts: Counter = Counter()
    counted_storage(counts)
    print("| shards | workers | ms per shard | finish, s | open, s | KiB per shard | lists | all requests per shard |")
    print("|---" * 8 + "|")
    for shards in sizes:
        for workers in (1, 4, 16, 64):
            found = bookkeep(shards, workers, counts)
            kinds = ("write", "read", "look", "list", "remove")
            print(
                f"| {shards:,} | {workers} | {1e3 * found['seconds'] / shards:.2f} | {found['finish']:.2f} | "
                f"{found['open']:.2f} | {1024 * found['mib'] / shards:.1f} | {found.get('list', 0)} | "
                f"{sum(found.get(kind, 0) for kind in kinds) / shards:.1f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels")
    parser.add_argument("--out")
    parser.add_argument("--bookkeeping", type=int, nargs="*", help="shards, in place of labels")
    parser.add_argument("--one", type=int, default=0, help="this size only, in this process, as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000, 10_000_000])
    options = parser.parse_args()
    if options.bookkeeping is not None:
        bookkeeping(options.bookkeeping or [10, 100, 1000, 10_000])
        return
    if not (options.labels and options.out):
        parser.error("--labels and --out are needed")
    if options.one:
        folder = Path(options.out) / str(options.one)
        # The first shards compile what the others use.
        measure(options.labels, folder, 2 * PER_SHARD)
        print(json.dumps(measure(options.labels, folder, options.one)))
        return
    results = {}
    for size in options.sizes:
        line = [sys.executable, "-m", "tests.benchmarks.scale", "--labels", options.labels, "--out", options.out]
        done = subprocess.run([*line, "--one", str(size)], stdout=subprocess.PIPE, text=True, check=True)
        results[size] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(Path(options.out) / str(size))
    print("| µs of processor time (bytes) per image | " + " | ".join(f"{size:,}" for size in results) + " |")
    print("|---" * (1 + len(results)) + "|")
    for name in STEPS:
        cells = [
            f"{1e6 * found[name][0] / size:.2f} ({found[name][1] * 2**20 / size:,.0f})"
            for size, found in results.items()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
