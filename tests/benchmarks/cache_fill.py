"""How fast the token cache is filled from a label set on a local disk, and in how much memory.

    python -m tests.benchmarks.cache_fill --labels runs/in1k/labels --out runs/cache-fill

``--labels`` is a real label set (`tests/benchmarks/real_labeler.py` makes one); a larger one with its statistics is
made of it first (q8, zarr). Then the cache is filled for its pictures in their order and in a random one, from the join
of the keys to the cache on disk.
"""

import argparse
import cProfile
import pstats
import shutil
import time
from pathlib import Path

import numpy as np

from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.join import join
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.resampled import key, make_set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--pictures", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    out = Path(options.out)
    label_set = make_set(options.labels, out / f"labels-{options.pictures}", options.pictures, options.shards)
    size = sum(shard.bytes for shard in label_set.shards)
    print(f"{len(label_set):,} pictures in {options.shards} shards, {size / len(label_set):,.0f} bytes each")
    names = label_set.spec.class_names
    keys = [key(position) for position in range(options.pictures)]
    hashes = np.arange(options.pictures, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    print("| order of the pictures | pictures/s | of them the join alone | CPU µs a picture | most memory MiB |")
    print("|---|---|---|---|---|")
    for name, order in (
        ("the label set's", np.arange(options.pictures)),
        ("random", np.random.default_rng(0).permutation(options.pictures)),
    ):
        theirs = [keys[position] for position in order.tolist()]
        results = []
        for _ in range(options.repeats + 1):
            shutil.rmtree(out / "cache", ignore_errors=True)
            started = time.perf_counter()
            join(label_set, theirs, hashes[order], names)
            joined = time.perf_counter() - started
            profile = cProfile.Profile()
            if options.profile:
                profile.enable()
            started, cpu = time.perf_counter(), time.process_time()
            with PeakMemory() as peak:
                cache = build_token_cache(label_set, theirs, hashes[order], names, folder=out / "cache")
            results.append((time.perf_counter() - started, joined, time.process_time() - cpu, peak.mib))
            profile.disable()
            del cache
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        # The first fill loads compiled code.
        seconds, joined, cpu, memory = sorted(results[1:])[len(results[1:]) // 2]
        n = options.pictures
        print(f"| {name} | {n / seconds:,.0f} | {n / joined:,.0f} | {1e6 * cpu / n:.1f} | {memory:,.0f} |")
    started = time.perf_counter()
    build_token_cache(label_set, theirs, hashes[order], names, folder=out / "cache")
    print(f"opened again in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
