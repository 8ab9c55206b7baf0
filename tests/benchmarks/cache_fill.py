"""How fast the token cache is filled from a label set on a local disk, and in how much memory.

    python -m tests.benchmarks.cache_fill --labels runs/in1k/labels --out runs/cache-fill

``--labels`` is a real label set (`tests/benchmarks/real_labeler.py` makes one). First, a larger one with its statistics
is made of it: q8, zarr, its top k or, with ``--draws``, draws. Then the cache is filled for its images in their order
and in a random one, from the join of the keys to the cache on disk. The parts are timed within the same fills: joining;
taking the space on the disk and mapping it; filling rows from shards; and having all of it on the disk.
"""

import argparse
import cProfile
import pstats
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np

from stl_offline.labels import cache as token_cache
from stl_offline.labels import cache_file
from tests.benchmarks.memory import PeakMemory
from tests.benchmarks.resampled import key, make_set

PARTS = {"join": "join", "space": "_make_arrays", "filling": "_place_shards", "disk": "_sync_files"}
CHECK = {"checksums": "_checksums"}


@contextmanager
def timed_parts(seconds: dict[str, float], parts: dict[str, str], module: ModuleType) -> Iterator[None]:
    """Put into ``seconds`` what each of ``parts``, functions of a module, takes while the context lasts."""

    def timed(part, function):
        def call(*arguments, **named):
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds[part] = time.perf_counter() - started

        return call

    functions = {name: timed(part, getattr(module, name)) for part, name in parts.items()}
    with mock.patch.multiple(module, **functions):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--labels", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--draws", type=int, default=0, help="labels of so many draws of a token, and no top-k")
    parser.add_argument("--encoding", default="q8")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--as-touched", action="store_true", help="map pages as they are touched, not at once")
    options = parser.parse_args()
    out, n = Path(options.out), options.images
    if options.as_touched:
        token_cache._map_pages = lambda array: None
    label_set = make_set(
        options.labels,
        out / f"labels-{n}-{options.encoding}-{options.draws}",
        n,
        options.shards,
        options.encoding,
        draws=options.draws,
    )
    size = sum(shard.bytes for shard in label_set.shards)
    print(f"{len(label_set):,} images in {options.shards} shards, {size / len(label_set):,.0f} bytes each")
    names = label_set.spec.class_names
    keys = [key(position) for position in range(n)]
    hashes = np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    print(
        "| order of the images | images/s | filling alone, images/s | " + " | ".join(f"{part} s" for part in PARTS),
        end="",
    )
    print(" | CPU µs per image | most memory MiB |\n|---|---|---|" + "---|" * (len(PARTS) + 2))
    for name, order in (
        ("the label set's", np.arange(n)),
        ("random", np.random.default_rng(0).permutation(n)),
    ):
        theirs = [keys[position] for position in order.tolist()]
        results = []
        profile = cProfile.Profile()
        for repeat in range(options.repeats + 1):
            shutil.rmtree(out / "cache", ignore_errors=True)
            parts: dict[str, float] = {}
            if options.profile and repeat:
                profile.enable()
            with PeakMemory() as peak, timed_parts(parts, PARTS, token_cache):
                started, cpu = time.perf_counter(), time.process_time()
                cache = token_cache.build_token_cache(label_set, theirs, hashes[order], names, folder=out / "cache")
                parts |= {"all": time.perf_counter() - started, "cpu": time.process_time() - cpu}
            profile.disable()
            results.append(parts | {"memory": peak.mib})
            del cache
        if options.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(15)
        # The first fill loads compiled code.
        middle = {part: statistics.median(result[part] for result in results[1:]) for part in results[0]}
        rates = [n / result["all"] for result in results[1:]], [n / result["filling"] for result in results[1:]]
        cells = [f"{statistics.median(rate):,.0f} ({min(rate):,.0f} to {max(rate):,.0f})" for rate in rates]
        cells += [f"{middle[part]:.2f}" for part in PARTS]
        print(f"| {name} | {' | '.join(cells)} | {1e6 * middle['cpu'] / n:.1f} | {middle['memory']:,.0f} |")
    size = sum(file.stat().st_size for file in (out / "cache").glob("*/*.npy"))
    parts = {}
    with timed_parts(parts, CHECK, cache_file):
        started = time.perf_counter()
        token_cache.build_token_cache(label_set, theirs, hashes[order], names, folder=out / "cache")
        seconds = time.perf_counter() - started
    print(
        f"opened again in {seconds:.2f} s, of which comparing {size / 1e9:.2f} GB with their checksums "
        f"{parts['checksums']:.2f} s: {1e9 * parts['checksums'] / size:.2f} s per GB"
    )


if __name__ == "__main__":
    main()
