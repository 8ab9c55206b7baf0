"""Token targets from sparse maps against the dense way of the older systems, side by side: time and memory.

    python tests/benchmarks/target_speed.py

B = 64 crops, 14×14 tokens, K = 1000, k = m = 5. The dense way is what TokenLabeling and ReLabel do on the side of the
targets: scatter each map's top k into (B, K, Gh, Gw), torchvision's `roi_align` to the student's grid, and the layout
that a soft cross-entropy takes, (B, N, K). Both sides start from the same maps and the same crops and run on one
thread; a soft target that keeps every class must equal the dense one.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np
import torch
from loader_speed import random_cache
from torch_peak import torch_peak_mib
from torchvision.ops import roi_align

from stl_offline.device import keep_freed_memory
from stl_offline.loader import TokenLabels
from stl_offline.loader.threads import Workers
from stl_offline.loader.token_op import TokenDraw
from stl_offline.targets import TokenTargets

GRID, RATIO = (14, 14), 2


def dense_targets(maps, boxes: torch.Tensor, classes: int) -> torch.Tensor:
    """(B, N, K) by scatter and `roi_align`; boxes: (B, 5), batch number and x0, y0, x1, y1 in cells of the map."""
    ids, probabilities = maps
    dense = torch.zeros(len(ids), classes, *ids.shape[1:3])
    dense.scatter_(1, ids.permute(0, 3, 1, 2), probabilities.permute(0, 3, 1, 2))
    aligned = roi_align(dense, boxes, GRID, sampling_ratio=RATIO, aligned=True)
    return aligned.flatten(2).transpose(1, 2).contiguous()


class Sparse:
    """The loader's own operation, called for one batch as FFCV calls it."""

    def __init__(self, cache, views: np.ndarray, kind: str, m: int) -> None:
        targets = TokenTargets(kind, GRID, m=m, sampling_ratio=RATIO)
        labels = TokenLabels(targets, cache)
        operation = TokenDraw(labels, Workers(1), 0, np.zeros(len(views), np.int64))
        operation.set_epoch(0, views, views, None, None)
        self._run = operation.generate_code()
        self._ids = np.arange(len(views))
        self._shape = (len(views), *GRID, labels.targets_per_token)

    def __call__(self) -> tuple[np.ndarray, np.ndarray]:
        places = (np.empty(self._shape, dtype=np.int32), np.empty(self._shape, dtype=np.float32))
        return self._run(self._ids, places, None, None)


def sparse_peak(make) -> float:
    """MiB that numpy holds at most, with what the operation keeps between batches."""
    tracemalloc.start()
    run = make()
    run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 2**20


def seconds(run) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    draw = np.random.default_rng(0)
    size, start = draw.uniform(0.4, 1.0, (2, options.batch, 2))
    start *= 1 - size
    views = np.zeros((options.batch, 6), dtype=np.float32)
    views[:, [0, 4]], views[:, [2, 5]] = size, start
    print("| targets | maps | dense ms | sparse ms | times faster | dense MiB | sparse MiB | times smaller |")
    print("|---|---|---|---|---|---|---|---|")
    for side in (14, 28):
        cache = random_cache(options.batch, side)
        ids = torch.from_numpy(cache.class_ids[:, 0].astype(np.int64))
        maps = (ids, torch.from_numpy(cache.probabilities[:, 0]))
        corners = np.concatenate([start, start + size], axis=1).astype(np.float32) * side
        boxes = torch.from_numpy(np.column_stack([np.arange(options.batch, dtype=np.float32), corners]))

        def dense(maps=maps, boxes=boxes, cache=cache):
            return dense_targets(maps, boxes, cache.num_classes)

        found_ids, found_weights = Sparse(cache, views, "soft", 100)()
        found = torch.zeros(options.batch, GRID[0] * GRID[1], cache.num_classes)
        flat_ids = torch.from_numpy(found_ids).flatten(1, 2).long()
        found.scatter_add_(2, flat_ids.clamp(min=0), torch.from_numpy(found_weights).flatten(1, 2))
        torch.testing.assert_close(found, dense(), atol=1e-5, rtol=1e-4)
        for kind in ("gumbel", "soft", "argmax"):
            run = Sparse(cache, views, kind, 5)
            run()
            pairs = [(seconds(dense), seconds(run)) for _ in range(options.pairs)]
            slow, quick = (statistics.median(times) for times in zip(*pairs, strict=True))
            faster = statistics.median(a / b for a, b in pairs)
            large, small = torch_peak_mib(dense), sparse_peak(lambda kind=kind: Sparse(cache, views, kind, 5))  # noqa: B023
            print(
                f"| {kind} | {side}×{side} | {slow * 1e3:.1f} | {quick * 1e3:.2f} | {faster:.0f} | {large:.1f} | "
                f"{small:.2f} | {large / small:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
