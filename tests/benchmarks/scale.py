"""Time and memory of work on whole label sets, from ten thousand to a million images: flat for each image, or not.

    python -m tests.benchmarks.scale --labels runs/in1k/labels --out runs/scale

Synthetic sets with a real set's statistics on a small grid (2 × 2, k = 2), so that what is measured is the keys, the
shard table and the bookkeeping; 1,000 images per shard, so that the largest has 1,000 shards. Each size in a process
of its own; memory is the most that a step takes of its own, without mapped files.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.join import join
from stl_offline.labels.label_set import open_label_set
from stl_offline.labels.manifest import Manifest
from stl_offline.labels.merge import merge
from stl_offline.labels.store import MANIFEST
from stl_offline.labels.verify import verify
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.resampled import key, make_set

PER_SHARD = 1000
STEPS = ("manifest", "merge", "verify", "join", "cache")


def measure(source: str, folder: Path, images: int) -> dict[str, tuple[float, float]]:
    """Seconds and MiB of each step on a set of ``images``."""
    shutil.rmtree(folder, ignore_errors=True)
    half, shards = images // 2, images // PER_SHARD
    smaller = {"grid": (2, 2), "top_k": 2}
    first = make_set(source, folder / "first", half, shards // 2, **smaller)
    second = make_set(source, folder / "second", half, shards // 2, start=half, **smaller)
    found: dict[str, tuple[float, float]] = {}

    def step(name: str, work) -> None:
        with PeakMemory() as peak:
            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
        found[name] = (seconds, peak.mib)

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--one", type=int, default=0, help="this size only, in this process, as JSON")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.labels, Path(options.out) / str(options.one), options.one)))
        return
    results = {}
    for size in options.sizes:
        line = [sys.executable, "-m", "tests.benchmarks.scale", "--labels", options.labels, "--out", options.out]
        done = subprocess.run([*line, "--one", str(size)], stdout=subprocess.PIPE, text=True, check=True)
        results[size] = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(Path(options.out) / str(size))
    print("| µs per image (bytes of memory per image) | " + " | ".join(f"{size:,}" for size in results) + " |")
    print("|---" * (1 + len(results)) + "|")
    for name in STEPS:
        cells = [
            f"{1e6 * found[name][0] / size:.2f} ({found[name][1] * 2**20 / size:,.0f})"
            for size, found in results.items()
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
