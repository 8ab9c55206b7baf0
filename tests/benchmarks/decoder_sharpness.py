"""What decoding at a DCT scale costs in sharpness: our crops against the whole decode resized by torchvision.

    python tests/benchmarks/decoder_sharpness.py IMAGES [--side 64] [--samples 256]

IMAGES is anything that `stl-offline pack` takes. Each image's crop is cut so that it is a given number of times
the output; the oracle decodes the whole JPEG with Pillow, cuts the same pixels and resizes them with torchvision
(antialias=True; for "area" OpenCV's INTER_AREA). Sharpness is the mean gradient, ours over the oracle's.
"""

import argparse
import io
from pathlib import Path

import cv2
import numpy as np
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torchvision.transforms import InterpolationMode

from stl_offline.config import INTERPOLATIONS
from stl_offline.geometry import whole_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader
from stl_offline.loader.decoder.decode import pixel_box

RATIOS = (1.0, 1.9, 2.0, 2.5, 3.0, 4.0, 5.9, 6.0, 8.0, 11.9, 12.0)


def oracle(pixels: np.ndarray, side: int, interpolation: str) -> np.ndarray:
    """uint8 (h, w, 3) → float (side, side, 3), not rounded."""
    if interpolation == "area":
        return cv2.resize(pixels.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    image = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    mode = InterpolationMode[interpolation.upper()]
    return tv.resize(image, [side, side], mode, antialias=True).clamp(0, 255).permute(1, 2, 0).numpy()


def gradient(image: np.ndarray) -> float:
    """Mean difference of neighbours, along both axes."""
    image = image.astype(np.float64)
    return np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean()


def crops(beton, side: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Samples large enough, and views (n, 6) that cut ``ratio`` · ``side`` pixels each way out of their middle."""
    length = round(ratio * side)
    views = whole_views(len(beton))
    fits = (beton.heights > length) & (beton.widths > length) & ~beton.raw
    for sample in np.flatnonzero(fits):
        height, width = int(beton.heights[sample]), int(beton.widths[sample])
        # Odd places, too: boxes do not start where blocks do.
        left, top = (width - length) // 2, (height - length) // 2
        views[sample] = (length / width, 0, left / width, 0, length / height, top / height)
    return np.flatnonzero(fits), views


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    arguments = parser.parse_args()
    beton = ensure_beton(str(arguments.images))
    side = arguments.side
    print("| interpolation | crop ÷ output | images | sharpness, median | 5 % of images below | PSNR, median dB |")
    print("|---|---|---|---|---|---|")
    for interpolation in INTERPOLATIONS:
        loader = TokenLoader(beton, ImageSettings((side, side), (0, 0, 0), (1, 1, 1), interpolation), 64)
        for ratio in arguments.ratios:
            samples, views = crops(beton, side, ratio)
            samples = samples[: arguments.samples]
            found = []
            for batch in loader.epoch(0, views, sample_ids=samples):
                for sample, image in zip(batch.sample_ids.tolist(), batch.images, strict=True):
                    ours = image.permute(1, 2, 0).numpy() * 255
                    whole = np.asarray(Image.open(io.BytesIO(beton.stored_bytes(sample))).convert("RGB"))
                    top, bottom, left, right, _ = pixel_box(views[sample], *whole.shape[:2])
                    best = oracle(whole[top:bottom, left:right], side, interpolation)
                    error = np.mean((ours - best) ** 2)
                    found.append((gradient(ours) / max(gradient(best), 1e-9), 10 * np.log10(255**2 / max(error, 1e-9))))
            if found:
                sharp, psnr = np.array(found).T
                print(
                    f"| {interpolation} | {ratio:g} | {len(found)} | {np.median(sharp):.3f} | "
                    f"{np.quantile(sharp, 0.05):.3f} | {np.median(psnr):.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
