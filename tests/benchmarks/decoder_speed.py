"""Images per second: our crops against FFCV's own random-resized-crop decoder, on the same .beton.

    python tests/benchmarks/decoder_speed.py IMAGES [--sides 224 128 64] [--workers 2] [--rounds 5]

IMAGES is anything that `stl-offline pack` takes. Both sides draw crops of the same distribution, load them through
FFCV's loader and end in the same normalised float32 batches. Rounds alternate; the table gives medians of the rounds'
ratios, by the clock and by processor time.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from stl_offline.config import INTERPOLATIONS
from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.loader.batch import ToDevice
from stl_offline.loader.threads import torch_threads_kept

# isort: split
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


def stock(beton, side: int, scale: tuple[float, float], workers: int):
    """One epoch of FFCV's own decoder, as a function that gives the number of images."""
    with torch_threads_kept():
        loader = Loader(
            str(beton.path),
            BATCH,
            num_workers=workers,
            os_cache=True,
            order=OrderOption.RANDOM,
            seed=0,
            drop_last=False,
            batches_ahead=2,
            pipelines={
                "image": [RandomResizedCropRGBImageDecoder((side, side), scale=scale)],
                "class_id": [IntDecoder()],
                "key_hash": None,
                "content_hash": None,
            },
        )
    to_device = ToDevice(torch.device("cpu"), side, MEAN, STD)

    def run(_: int) -> int:
        with torch_threads_kept():
            return sum(len(to_device.images(pixels)) for pixels, _ in loader)

    return run


def ours(beton, side: int, scale: tuple[float, float], workers: int, interpolation: str):
    """One epoch of this package's loader."""
    loader = TokenLoader(beton, ImageSettings((side, side), MEAN, STD, interpolation), BATCH, workers=workers)

    def run(epoch: int) -> int:
        views = draw_views(
            0, epoch, np.arange(len(beton)), beton.heights, beton.widths, CropSettings(scale=scale, flip=0.0)
        )
        return sum(len(batch) for batch in loader.epoch(epoch, views))

    return run


def measure(run, epoch: int) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    run(epoch)
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 128, 64])
    parser.add_argument("--least-area", type=float, default=0.25, help="of the crops, as a share of the image")
    arguments = parser.parse_args()
    beton = ensure_beton(str(arguments.images))
    print("| output, px | interpolation | FFCV's images per second | ours ÷ FFCV's | by processor time |")
    print("|---|---|---|---|---|")
    scale = (arguments.least_area, 1.0)
    for side in arguments.sides:
        base = stock(beton, side, scale, arguments.workers)
        mine = {name: ours(beton, side, scale, arguments.workers, name) for name in INTERPOLATIONS}
        for run in (base, *mine.values()):
            run(0)
        for name, run in mine.items():
            ratios, rates = [], []
            for round_ in range(arguments.rounds):
                sides = (base, run) if round_ % 2 else (run, base)
                times = {id(part): measure(part, round_) for part in sides}
                ratios.append(np.divide(times[id(base)], times[id(run)]))
                rates.append(len(beton) / times[id(base)][0])
            clock, processor = np.median(ratios, axis=0)
            rate = np.median(rates)
            print(f"| {side} | {name} | {rate:.0f} | {clock:.2f} | {processor:.2f} |", flush=True)


if __name__ == "__main__":
    main()
