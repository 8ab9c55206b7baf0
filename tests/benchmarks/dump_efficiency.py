"""A dump's speed against its two parts alone, on the same cores: loading the images, and the labeler's forward pass.

    python -m tests.benchmarks.dump_efficiency -- --data tiny20-train.tar --labeler runs/labeler --out runs/efficiency

Two parts that share the cores can reach 1 / (1/loading + 1/forward) images per second together. What is left of that is
what taking the top k, encoding, checksums and writing cost. Options after ``--`` go to ``dump-labels`` as they are:

    … -- --labeler-checkpoint FILE --labeler-by-order --img-size 448 --batch-size 16

With ``--at-once 1``, all cores share each batch. With ``--processes 1 2 4``, so many workers write one label set, each
with its share of the cores. Processor seconds are those of all threads; where other programs run, compare those.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from stl_offline.cli.dump_labels import dump_labels as dump_command
from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.dump import Labelling, load_labeler
from stl_offline.dump import labelling as labelling_module
from stl_offline.dump.job import _write_shards
from stl_offline.dump.labelling import _each
from stl_offline.images.pack import ensure_beton


def load(labelling: Labelling, samples: np.ndarray) -> torch.Tensor:
    """Load all, label none; gives the last whole batch."""
    kept = None
    for batch in labelling.loader.epoch(0, labelling.views[0], sample_ids=samples):
        kept = batch.images if kept is None or len(batch) == len(kept) else kept
    return kept


def label(labelling: Labelling, images: torch.Tensor, count: int) -> None:
    """The forward pass alone, on the same images again and again, of as many batches at a time as in a dump."""

    @torch.inference_mode()
    def forward(_: int) -> Callable[[], None]:
        labelling.labeler(images)
        return lambda: None

    for _ in _each(forward, range(0, count, len(images)), labelling._batches_at_once):
        pass


def dump(labelling: Labelling) -> int:
    """The job: load, label, encode, write. Gives the number of images that this process labelled."""
    with labelling.open_writer() as writer:
        labelled = _write_shards(labelling, writer, False)
        writer.finish()
    return labelled


def prepare(config: DumpConfig) -> Labelling:
    return Labelling(config, load_labeler(config), ensure_beton(config.data), pick_device(config.device))


class Clock:
    """``with Clock() as clock: …`` then ``clock.seconds`` and ``clock.cpu``."""

    def __enter__(self) -> "Clock":
        self._started, self._before = time.perf_counter(), _cpu()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._started, _cpu() - self._before


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def parts(config: DumpConfig, repeats: int) -> None:
    """The table of loading, forward pass and dump."""
    labelling = prepare(config)
    n = len(labelling.beton)
    samples = np.arange(n)
    images = load(labelling, samples).clone()
    rows = []
    for _ in range(repeats + 1):  # the first one loads compiled code
        shutil.rmtree(config.out, ignore_errors=True)
        with Clock() as loading:
            load(labelling, samples)
        with Clock() as forward:
            label(labelling, images, n)
        with Clock() as together:
            dump(labelling)
        scale = n / (len(images) * -(-n // len(images)))
        row = [(loading.seconds, loading.cpu), (forward.seconds * scale, forward.cpu * scale)]
        rows.append([*row, (together.seconds, together.cpu)])
        print(*(f"{seconds:.2f} s ({cpu:.2f} of the processor)" for seconds, cpu in rows[-1]), sep="; ", flush=True)
    print(f"{n:,} images, {labelling.spec.encoding}, {torch.get_num_threads()} threads")
    print("| images per | loading alone | forward alone | dump | of what both can reach |\n|---|---|---|---|---|")
    for name, place in (("second", 0), ("processor second", 1)):
        found = np.array([[part[place] for part in row] for row in rows[1:]])
        share = (found[:, 0] + found[:, 1]) / found[:, 2]
        rates = " | ".join(f"{n / seconds:,.1f}" for seconds in np.median(found, axis=0))
        print(f"| {name} | {rates} | {np.median(share):.1%} ({share.min():.1%} to {share.max():.1%}) |")


def worker(config: DumpConfig, threads: int, ready, results) -> None:
    """One of several processes that write one label set."""
    torch.set_num_threads(threads)
    labelling = prepare(config)
    labelling.label(np.arange(min(len(labelling.beton), config.batch_size)), lambda done: None)
    ready.wait()
    with Clock() as clock:
        labelled = dump(labelling)
    results.put((clock.seconds, clock.cpu, labelled))


def crowd(config: DumpConfig, processes: int) -> tuple[float, float, int]:
    """Wall and processor seconds of so many workers, and the images that they labelled together."""
    shutil.rmtree(config.out, ignore_errors=True)
    fork = multiprocessing.get_context("fork")
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    ready, results = fork.Barrier(processes), fork.Queue()
    config = replace(config, workers=threads)
    started = [fork.Process(target=worker, args=(config, threads, ready, results)) for _ in range(processes)]
    for each in started:
        each.start()
    found = [results.get(timeout=3000) for _ in started]
    for each in started:
        each.join()
    seconds, cpu, labelled = zip(*found, strict=True)
    return max(seconds), sum(cpu), sum(labelled)


def crowds(config: DumpConfig, numbers: list[int], repeats: int) -> None:
    """The table of several workers."""
    n = len(ensure_beton(config.data))
    rows: dict[int, list[tuple[float, float, int]]] = {number: [] for number in numbers}
    for _ in range(repeats):
        for number in numbers:
            rows[number].append(crowd(config, number))
            print(number, json.dumps(rows[number][-1]), flush=True)
    print("| workers | images per second | images per processor second | relative to one | labelled twice |")
    print("|---" * 5 + "|")
    one = [cpu for _, cpu, _ in rows[numbers[0]]]
    for number in numbers:
        seconds, cpu, labelled = (np.array(column) for column in zip(*rows[number], strict=True))
        share = np.median(np.array(one) / cpu)
        twice = labelled.sum() / (n * repeats) - 1
        print(
            f"| {number} | {n / statistics.median(seconds):,.1f} | {n / statistics.median(cpu):,.1f} | {share:.1%} | "
            f"{twice:.2%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", help="workers of one label set")
    parser.add_argument("--at-once", type=int, help="batches that a CPU labels at the same time")
    known, rest = parser.parse_known_args()
    if known.at_once:
        labelling_module._CPU_BATCHES = known.at_once
    os.environ["STL_OFFLINE_QUIET"] = "1"
    values = dump_command.make_context("dump-labels", [word for word in rest if word != "--"]).params
    config = DumpConfig(**{name: values[name] for name in DumpConfig.__dataclass_fields__ if name in values})
    if known.processes:
        crowds(config, known.processes, known.repeats)
    else:
        parts(config, known.repeats)


if __name__ == "__main__":
    main()
