"""A dump's speed against its two parts alone, on the same cores: loading the images, and the labeler's forward pass.

    python -m tests.benchmarks.dump_efficiency --data tiny20-train.tar --labeler runs/labeler --out runs/efficiency

Two parts that share the cores can reach 1 / (1/loading + 1/forward) images per second together. What is left of that is
what taking the top k, encoding, checksums and writing cost. Options after ``--`` go to ``dump-labels`` as they are:

    … -- --labeler-checkpoint FILE --labeler-by-order --img-size 448 --batch-size 16
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from stl_offline.cli.dump_labels import dump_labels as dump_command
from stl_offline.config import DumpConfig
from stl_offline.device import pick_device
from stl_offline.distributed import World
from stl_offline.dump import Labelling
from stl_offline.dump.job import _open_together, _write_shards
from stl_offline.images.pack import ensure_beton


def load(labelling: Labelling, samples: np.ndarray) -> torch.Tensor:
    """Load all, label none; gives the last whole batch."""
    kept = None
    for batch in labelling.loader.epoch(0, labelling.views[0], sample_ids=samples):
        kept = batch.images if kept is None or len(batch) == len(kept) else kept
    return kept


@torch.inference_mode()
def label(labelling: Labelling, images: torch.Tensor, count: int) -> None:
    """The forward pass alone, on the same images again and again."""
    for _ in range(0, count, len(images)):
        labelling.labeler(images)


def dump(labelling: Labelling, out: Path) -> None:
    """The job: load, label, encode, write."""
    shutil.rmtree(out, ignore_errors=True)
    world = World()
    with _open_together(str(out), labelling.spec, labelling.num_shards, world) as (writer, shards):
        _write_shards(labelling, writer, shards, world)
        writer.finish()


def clock(work, *arguments) -> float:
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    known, rest = parser.parse_known_args()
    values = dump_command.make_context("dump-labels", [word for word in rest if word != "--"]).params
    config = DumpConfig(**{name: value for name, value in values.items() if name not in ("estimate", "as_json")})
    labelling = Labelling(config, ensure_beton(config.data), pick_device(config.device))
    n = len(labelling.beton)
    samples = np.arange(n)
    images = load(labelling, samples).clone()
    dump(labelling, Path(config.out))  # loads compiled code
    rows = []
    for _ in range(known.repeats):
        loading = n / clock(load, labelling, samples)
        forward = len(images) * -(-n // len(images)) / clock(label, labelling, images, n)
        together = n / clock(dump, labelling, Path(config.out))
        rows.append((loading, forward, together, together * (1 / loading + 1 / forward)))
    print(f"{n:,} images, {labelling.spec.encoding}, {torch.get_num_threads()} threads")
    print("| loading alone | forward alone | dump | of what both can reach |\n|---|---|---|---|")
    loading, forward, together, share = (statistics.median(column) for column in zip(*rows, strict=True))
    shares = [row[3] for row in rows]
    print(
        f"| {loading:,.1f} | {forward:,.1f} | {together:,.1f} | {share:.1%} ({min(shares):.1%} to {max(shares):.1%}) |"
    )


if __name__ == "__main__":
    main()
