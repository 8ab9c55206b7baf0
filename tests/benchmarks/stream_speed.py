"""What token labels cost in loops of one's own, and what reading images where they lie costs in ours.

    python -m tests.benchmarks.stream_speed --data in1k-512.tar --out runs/stream [--rounds 5]

Each row compares a loop with the same loop without labels (the last rows: images read where they lie, with packed
images). Rounds alternate. The table gives medians of the rounds' ratios, with the smallest and the largest, by the
clock and by processor time; and the ratio of each side's quickest round by processor time, which other work on the
machine changes least. Labels are random: 1,000 classes, 14 × 14 tokens, k = 5.
"""

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader

import stl_offline as stl
from stl_offline.images.pack import ensure_beton
from stl_offline.images.sources import open_source
from stl_offline.images.unpacked import open_unpacked
from stl_offline.loader import StreamLoader
from stl_offline.loops.dataset import Item, TokenBatch

GRID, CLASSES, SIDE, BATCH = (14, 14), 1000, 224, 64


class Tars(torch.utils.data.Dataset):
    """Images of tars as a map-style dataset: (PIL image, class id)."""

    def __init__(self, data: str) -> None:
        source = open_source(data)
        self.images, self.classes = list(source), list(source.class_names)
        self.keys = [image.key for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        return webdataset.autodecode.imagehandler("pil")("image.jpg", image.data), image.class_id


class Unlabelled(stl.TokenLabelDataset):
    """The same dataset, whose batches have no token targets."""

    def collate(self, items: list[Item]) -> TokenBatch:
        views = torch.from_numpy(np.stack([item.view for item in items]))
        numbers = (torch.tensor([getattr(item, name) for item in items]) for name in ("class_id", "sample"))
        class_ids, samples = numbers
        return TokenBatch(torch.stack([item.pixels for item in items]), class_ids, None, None, samples, views)


def write_labels(data: str, out: Path, classes: list[str]) -> str:
    """A label set of random labels."""
    place = str(out / "labels")
    names = classes + [f"other {number}" for number in range(CLASSES - len(classes))]
    config = stl.DumpConfig(data=data, labeler="random", out=place, img_size=32, shards=4, workers=1, device="cpu")
    generator = torch.Generator().manual_seed(0)

    def random(images: torch.Tensor) -> torch.Tensor:
        return 3 * torch.randn(len(images), GRID[0] * GRID[1], len(names), generator=generator)

    stl.label_with(random, config, class_names=names, grid=GRID)
    return place


def measure(loop: Callable[[], int]) -> np.ndarray:
    """Images per second of the clock and of the processor, worker processes included."""
    begun, processor = time.perf_counter(), _processor_seconds()
    images = loop()
    return images / np.array([time.perf_counter() - begun, _processor_seconds() - processor])


def _processor_seconds() -> float:
    parts = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in parts)


def compare(name: str, plain: Callable[[], int], other: Callable[[], int], rounds: int) -> None:
    """Print a row of the table."""
    for loop in (plain, other):
        loop()  # compiles, and reads the files once
    rates = []
    for number in range(rounds):
        pair = [measure(loop) for loop in ((plain, other) if number % 2 else (other, plain))]
        rates.append(pair if number % 2 else pair[::-1])
    before, after = np.array(rates).swapaxes(0, 1)  # (rounds, 2) each: by the clock and by processor time
    clock, processor = 100 * (after / before).T
    cells = [f"{np.median(each):.1f} % ({each.min():.1f} to {each.max():.1f})" for each in (clock, processor)]
    quickest = after[:, 1].max() / before[:, 1].max()
    print(f"| {name} | {before[:, 1].max():,.0f} | {' | '.join(cells)} | {quickest:.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="a tar of images, or several")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tars = Tars(options.data)
    place = write_labels(options.data, options.out, tars.classes)
    labels = stl.TokenLabels.of(place, grid=GRID)
    crop = stl.RandomResizedCrop(SIDE)
    print("| loop | images per CPU second | images per second, relative | by CPU time | quickest rounds |")
    print("|---|---|---|---|---|")

    def show(sample: dict[str, Any]) -> dict[str, Any]:
        return sample | {"pixels": crop(sample["jpg" if "jpg" in sample else "jpeg"], 0)[0]}

    def stream(decoded: bool, joined: bool) -> int:
        images = webdataset.WebDataset(options.data, shardshuffle=False)
        if decoded:
            images = images.decode("pil").map(show)
        if joined:
            images = stl.join_labels(images, labels)
        return sum(1 for _ in images)

    for decoded, name in ((False, "webdataset, undecoded"), (True, "webdataset, decoded and cropped")):
        compare(
            f"`join_labels` alone: {name}",
            lambda decoded=decoded: stream(decoded, False),
            lambda decoded=decoded: stream(decoded, True),
            options.rounds,
        )

    def loader(kind: type[stl.TokenLabelDataset], targets: str) -> Callable[[], int]:
        own = stl.TokenLabels.of(place, grid=GRID, kind=targets, **({"m": 5} if targets == "soft" else {}))
        dataset = kind(tars, own, crop, keys=tars.keys, class_names=own.class_names)
        batches = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=2, collate_fn=dataset.collate)
        return lambda: sum(len(batch.images) for batch in batches)

    for targets in ("gumbel", "soft"):
        name = f"`TokenLabels`, {targets}: `DataLoader`, 2 workers"
        compare(name, loader(Unlabelled, targets), loader(stl.TokenLabelDataset, targets), options.rounds)

    packed, unpacked = ensure_beton(options.data), open_unpacked(options.data)
    views = stl.draw_views(0, 0, np.arange(len(packed)), packed.heights, packed.widths, stl.CropSettings())
    for workers in (1, 2):
        loaders = [
            kind(images, stl.ImageSettings((SIDE, SIDE)), BATCH, workers=workers)
            for kind, images in ((stl.TokenLoader, packed), (StreamLoader, unpacked))
        ]
        loops = [lambda loader=loader: sum(map(len, loader.epoch(0, views))) for loader in loaders]
        compare(f"`--loader stream` against `ffcv`, {workers} workers", *loops, options.rounds)


if __name__ == "__main__":
    main()
