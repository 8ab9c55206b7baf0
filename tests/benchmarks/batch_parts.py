"""Where the time of a batch goes, from stored bytes to the token loss: CPU milliseconds on one core.

    python tests/benchmarks/batch_parts.py IMAGES [--side 224] [--batches 8]

IMAGES is anything that `stl-offline pack` takes. 64 random crops per batch, 14×14 maps, 196 tokens, 1,000 classes. Each
part is the loader's own, called alone on the same batches in turn; medians of the batches.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from loader_speed import random_cache
from numba import njit
from target_speed import Sparse

from stl_offline.device import keep_freed_memory
from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader.batch import ToDevice
from stl_offline.loader.decoder.decode import ViewCrop, choose_shrink, pixel_box
from stl_offline.loader.decoder.planes import NOTES_INTS, read_planes, scratch_bytes
from stl_offline.loader.threads import Workers
from stl_offline.losses import token_cross_entropy

BATCH, TOKENS, CLASSES = 64, 196, 1000


@njit
def call_read_planes(*arguments):
    return read_planes(*arguments)


class Images:
    """The image side of the loader, without its threads."""

    def __init__(self, beton, side: int) -> None:
        self.beton, self.side = beton, side
        self.bytes = np.memmap(beton.path, dtype=np.uint8, mode="r").view(np.ndarray)
        self.crop = ViewCrop((side, side), Workers(1), beton)
        self.pixels = np.empty((BATCH, side, side, 3), dtype=np.uint8)
        self.run = self.crop.generate_code()
        sizes = zip(beton.heights.tolist(), beton.widths.tolist(), beton.sizes.tolist(), strict=True)
        self.scratch = np.empty(max(scratch_bytes(*size) for size in sizes), dtype=np.uint8)
        self.notes = np.zeros(NOTES_INTS, dtype=np.int64)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Decoding and resizing."""
        return self.run(ids, self.pixels, None, (self.bytes,))

    def entropy(self, ids: np.ndarray, views: np.ndarray) -> None:
        """Decoding alone: JPEG to planes, as far as each crop needs them."""
        beton, handle = self.beton, self.crop._decompressors.handles[0]
        for sample in ids.tolist():
            height, width, start = int(beton.heights[sample]), int(beton.widths[sample]), int(beton.pointers[sample])
            if beton.raw[sample]:
                continue
            top, bottom, left, right, _ = pixel_box(views[sample], height, width)
            shrink = max(choose_shrink(0, bottom - top, right - left, self.side, self.side), 1)
            data = self.bytes[start : start + int(beton.sizes[sample])]
            call_read_planes(handle, data, height, width, bottom, shrink, True, self.scratch, self.notes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batches", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    beton = ensure_beton(str(options.images))
    side = options.side
    views = draw_views(0, 0, np.arange(len(beton)), beton.heights, beton.widths, CropSettings(scale=(0.25, 1.0)))
    images, to_device = Images(beton, side), ToDevice(torch.device("cpu"), side, (0.5,) * 3, (0.25,) * 3)
    images.crop.set_views(views)
    cache = random_cache(BATCH, 14)
    gumbel, soft = (Sparse(cache, views[:BATCH], kind, 5) for kind in ("gumbel", "soft"))
    logits = torch.randn(BATCH, TOKENS, CLASSES, requires_grad=True)

    def loss(targets) -> None:
        logits.grad = None
        ids, weights = (torch.from_numpy(array).flatten(1, 2) for array in targets)
        token_cross_entropy(logits, ids.long(), weights, 0.1).backward()

    drawn, mixed = gumbel(), soft()
    parts = {
        "JPEG to planes": lambda ids: images.entropy(ids, views),
        "all of decoding (planes, resizing, colours)": images.decode,
        "to normalised float32": lambda ids: to_device.images(images.pixels),
        "token targets, gumbel": lambda ids: gumbel(),
        "token targets, soft": lambda ids: soft(),
        "token loss and its gradient, gumbel": lambda ids: loss(drawn),
        "token loss and its gradient, soft": lambda ids: loss(mixed),
    }
    order = np.random.default_rng(0).permutation(len(beton))
    batches = [order[start : start + BATCH] for start in range(0, len(order) - BATCH + 1, BATCH)][: options.batches]
    times = {name: [] for name in parts}
    for round_ in range(2):
        for ids in batches:
            for name, run in parts.items():
                started = time.process_time()
                run(ids)
                if round_:
                    times[name].append(time.process_time() - started)
    print(f"| part, batch of {BATCH} at {side} px | ms |")
    print("|---|---|")
    for name, taken in times.items():
        print(f"| {name} | {1e3 * statistics.median(taken):.2f} |")


if __name__ == "__main__":
    main()
