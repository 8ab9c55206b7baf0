"""Processor seconds of compilation in the first `train-student` on a fresh machine, in total and per function.

    python -m tests.benchmarks.first_use [--data IMAGES] [--workers 2] [--warm]

Without --data: 48 JPEGs of 320×240 px. A process with an empty cache of compiled code packs them and trains one epoch
of the smallest model on synthetic labels (q8, 14×14, k = 2). numba reports each compilation, in processor time; the
time of a function's callees is not counted twice. --warm: runs it once more with the cache that the first run left.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from stl_offline.images.beton import open_beton
from stl_offline.images.pack import pack
from stl_offline.labels.writer import LabelSetWriter
from tests.labels.synthetic import make_arrays, make_spec

CHILD = """
import json, sys, threading, time
started = time.perf_counter()
from numba.core import event

class Times(event.Listener):
    def __init__(self):
        self.stacks, self.seconds = {}, {}
    def on_start(self, event):
        self.stacks.setdefault(threading.get_ident(), []).append([time.thread_time(), 0.0])
    def on_end(self, event):
        stack = self.stacks[threading.get_ident()]
        begun, inner = stack.pop()
        took = time.thread_time() - begun
        if stack:
            stack[-1][1] += took
        function = event.data["dispatcher"].py_func
        name = f"{function.__module__}.{function.__qualname__}"
        count, seconds = self.seconds.get(name, (0, 0.0))
        self.seconds[name] = count + 1, seconds + took - inner

times = Times()
event.register("numba:compile", times)
from stl_offline.cli.main import main
code = main(sys.argv[2:])
assert code == 0, code
with open(sys.argv[1], "w") as stream:
    json.dump({"seconds": times.seconds, "all": time.perf_counter() - started}, stream)
"""


def make_images(folder: Path, count: int = 48) -> Path:
    """Smooth noise, in three classes."""
    for number in range(count):
        colours = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / f"class {number % 3}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def make_labels(beton, folder: Path) -> None:
    """Synthetic labels of these images."""
    spec = make_spec(
        len(beton), len(beton.class_names), (14, 14), 2, class_names=tuple(beton.class_names), encoding="q8"
    )
    with LabelSetWriter(folder, spec, 1) as writer:
        for shard in writer.todo():
            first, last = writer.shard_range(shard)
            arrays = make_arrays(spec, first, last)
            arrays.keys[:] = beton.keys[first:last]
            arrays.content_hash[:] = beton.content_hashes[first:last]
            writer.write_shard(shard, arrays)
        writer.finish()


def run(python: str, arguments: list[str], cache: Path, report: Path) -> dict:
    """Run the command line in a process of its own, with compiled code in ``cache``."""
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(cache / "numba"),
        "STL_OFFLINE_CACHE": str(cache),
        "STL_OFFLINE_QUIET": "1",
    }
    subprocess.run(
        [python, "-c", CHILD, str(report), *arguments], env=environment, check=True, cwd=cache.parent, stdout=sys.stderr
    )
    return json.loads(report.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="images instead of the made ones")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--warm", action="store_true", help="run again with the cache of the first run")
    parser.add_argument("--least", type=float, default=0.1, help="list functions that take so many seconds")
    parser.add_argument("--python", default=sys.executable, help="interpreter of an installation to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = options.data or make_images(folder / "images")
        pack(images, folder / "own.beton")
        make_labels(open_beton(folder / "own.beton"), folder / "labels")
        arguments = ["train-student", "--data", str(images), "--labels", str(folder / "labels"), "--epochs", "1"]
        arguments += ["--workers", str(options.workers), "--batch-size", "16", "--device", "cpu"]
        for state in ("cold", "warm")[: 1 + options.warm]:
            started = time.perf_counter()
            found = run(
                options.python,
                [*arguments, "--out", str(folder / f"run-{state}")],
                folder / "cache",
                folder / f"{state}.json",
            )
            total = sum(seconds for _, seconds in found["seconds"].values())
            versions = sum(count for count, _ in found["seconds"].values())
            print(f"{state}: {total:.1f} s of compilation, {versions} versions of {len(found['seconds'])} functions;")
            print(f"the command took {time.perf_counter() - started:.1f} s")
            if state == "cold":
                print("| function | versions | s |")
                print("|---|---|---|")
                for name, (count, seconds) in sorted(found["seconds"].items(), key=lambda item: -item[1][1]):
                    if seconds >= options.least:
                        print(f"| {name} | {count} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
