"""What keeping freed memory is worth on a CPU: the same forward passes in two processes, with it and without, in turn.

python tests/benchmarks/freed_memory.py
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import timm
import torch

from stl_offline.device import keep_freed_memory


def measure(model: str, size: int, batch: int, passes: int) -> dict[str, float]:
    """Seconds and page faults of one forward pass, in this process."""
    network = timm.create_model(model).eval().to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(images)
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(passes):
            network(images)
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": seconds / passes,
        "cpu_seconds": (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / passes,
        "faults": (after.ru_minflt - before.ru_minflt) / passes,
        "peak_mib": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--child", choices=["kept", "returned"])
    options = parser.parse_args()
    if options.child:
        if options.child == "kept":
            keep_freed_memory()
        print(json.dumps(measure(options.model, options.size, options.batch, options.passes)))
        return
    pairs = [
        {
            child: json.loads(subprocess.check_output([sys.executable, *sys.argv, "--child", child]))
            for child in ("returned", "kept")
        }
        for _ in range(options.pairs)
    ]
    print("| freed memory | CPU seconds a pass | page faults | peak MiB |\n|---|---|---|---|")
    for child in ("returned", "kept"):
        row = {name: statistics.median(pair[child][name] for pair in pairs) for name in pairs[0][child]}
        print(f"| {child} | {row['cpu_seconds']:.2f} | {row['faults']:,.0f} | {row['peak_mib']:,.0f} |")
    for name in ("seconds", "cpu_seconds"):
        ratios = [pair["returned"][name] / pair["kept"][name] for pair in pairs]
        print(
            f"returned / kept, {name}: median {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
