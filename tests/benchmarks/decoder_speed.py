"""Images per second: our crops against FFCV's own random-resized-crop decoder, on the same .beton.

    python tests/benchmarks/decoder_speed.py IMAGES [--sides 224 128 64] [--workers 2] [--rounds 5]
    python tests/benchmarks/decoder_speed.py --blend [--rounds 21]

IMAGES is anything that `stl-offline pack` takes. Both sides draw crops of the same distribution, load them through
FFCV's loader and end in the same normalised float32 batches. Rounds alternate; the table gives medians of the rounds'
ratios, by the clock and by processor time.

--blend: a row of pixels filtered along itself by the decoder's own instructions (`blend_pixels`), against the same in
plain compiled Python: processor time, one thread.
"""

import argparse
import functools
import time
from pathlib import Path

import numpy as np
import torch
from numba import njit

from stl_offline.config import INTERPOLATIONS
from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.loader.batch import ToDevice
from stl_offline.loader.decoder.lines import LINE_SLACK, resample_line
from stl_offline.loader.decoder.resample import filter_weights
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


@njit
def blended(line, firsts, weights, used, result, repeats):
    """Filter a row ``repeats`` times as the decoder does."""
    for _ in range(repeats):
        resample_line(line, np.int64(0), firsts, weights, used, False, result)


@njit
def plain(line, firsts, weights, used, result, repeats):
    """The same without instructions of our own."""
    for _ in range(repeats):
        for output in range(len(firsts)):
            red = green = blue = np.float32(0.0)
            for tap in range(used):
                weight = weights[output, tap]
                at = 3 * (firsts[output] + tap)
                red += weight * line[at]
                green += weight * line[at + 1]
                blue += weight * line[at + 2]
            result[3 * output] = red
            result[3 * output + 1] = green
            result[3 * output + 2] = blue


def compare_blending(rounds: int, width: int = 224, repeats: int = 2000) -> None:
    """Rows of ``width`` pixels from others of 1.5 and 3 times as many."""
    print(
        "| interpolation | source ÷ output | weights per pixel | plain, µs per row | blend_pixels, µs | times faster |"
    )
    print("|---|---|---|---|---|---|")
    for kind, name in enumerate(INTERPOLATIONS):
        for scale in (1.5, 3.0):
            pixels = int(width * scale)
            line = np.zeros(3 * (pixels + 8), dtype=np.float32)
            line[: 3 * pixels] = np.random.default_rng(0).uniform(0, 255, 3 * pixels)
            firsts, weights, used = filter_weights(kind, 0.0, float(pixels), width, pixels)
            results = np.zeros((2, 3 * width + LINE_SLACK), dtype=np.float32)
            sides = [
                functools.partial(function, line, firsts, weights, used, result)
                for function, result in zip((plain, blended), results, strict=True)
            ]
            times = []
            for run in sides:
                run(1)
            np.testing.assert_allclose(*results[:, : 3 * width], rtol=1e-5)
            for _ in range(rounds):
                taken = []
                for run in sides:
                    started = time.process_time()
                    run(repeats)
                    taken.append(1e6 * (time.process_time() - started) / repeats)
                times.append(taken)
            slow, quick = np.median(times, axis=0)
            ratios = np.divide(*np.transpose(times))
            print(
                f"| {name} | {scale} | {used} | {slow:.2f} | {quick:.2f} | {np.median(ratios):.2f} "
                f"({ratios.min():.2f} to {ratios.max():.2f}) |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, nargs="?")
    parser.add_argument("--blend", action="store_true", help="compare the filtering of a row alone")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 128, 64])
    parser.add_argument("--least-area", type=float, default=0.25, help="of the crops, as a share of the image")
    arguments = parser.parse_args()
    if arguments.blend:
        compare_blending(arguments.rounds)
        return
    if arguments.images is None:
        parser.error("IMAGES or --blend is needed")
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
