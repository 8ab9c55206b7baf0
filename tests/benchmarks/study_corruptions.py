"""Corrupted validation images: noise, blur, weather and digital kinds by kornia, each at three severities.

The idea is ImageNet-C's (Hendrycks and Dietterich, arXiv 1903.12261); its own code wants 224 pixels and packages that
no longer install. Strengths here are for 64 pixels. n: images; S: severities.
"""

import json
from collections.abc import Callable
from pathlib import Path

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.files import atomic_path, atomic_write, canonical_json
from stl_offline.geometry import center_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader

ALWAYS = {"p": 1.0}
# family → kind → (what makes it from a strength, the strengths of the severities, weakest first).
KINDS: dict[str, dict[str, tuple[Callable[..., nn.Module], tuple]]] = {
    "noise": {
        "gaussian noise": (lambda std: K.RandomGaussianNoise(std=std, **ALWAYS), (0.05, 0.1, 0.2)),
        "salt and pepper": (
            lambda share: K.RandomSaltAndPepperNoise((share, share), (0.5, 0.5), **ALWAYS),
            (0.02, 0.05, 0.1),
        ),
    },
    "blur": {
        "gaussian blur": (lambda sigma: K.RandomGaussianBlur((9, 9), (sigma, sigma), **ALWAYS), (0.7, 1.2, 2.0)),
        "motion blur": (lambda side: K.RandomMotionBlur(side, 45.0, 0.0, "reflect", **ALWAYS), (3, 5, 9)),
        "median blur": (lambda side: K.RandomMedianBlur((side, side), **ALWAYS), (3, 5, 7)),
    },
    "weather": {
        "snow": (lambda share: K.RandomSnow((share, share), (2.0, 2.0), **ALWAYS), (0.2, 0.35, 0.5)),
        "rain": (lambda drops: K.RandomRain((drops, drops), (4, 8), (-2, 2), **ALWAYS), (30, 80, 160)),
        "coloured haze": (
            lambda light: K.RandomPlasmaBrightness((0.4, 0.4), (light, light), **ALWAYS),
            (0.3, 0.5, 0.8),
        ),
    },
    "digital": {
        "jpeg": (lambda quality: K.RandomJPEG((quality, quality), **ALWAYS), (40.0, 20.0, 10.0)),
        "darkness": (lambda factor: K.RandomContrast((factor, factor), **ALWAYS), (0.6, 0.4, 0.2)),
        "posterize": (lambda bits: K.RandomPosterize((bits, bits), **ALWAYS), (4.0, 3.0, 2.0)),
        "elastic": (
            lambda alpha: K.RandomElasticTransform((15, 15), (4.0, 4.0), (alpha, alpha), **ALWAYS),
            (0.3, 0.6, 1.0),
        ),
    },
}
SEVERITIES = 3


def family_of(kind: str) -> str:
    """The family that a kind belongs to."""
    return next(family for family, kinds in KINDS.items() if kind in kinds)


def make_corrupted(val: str, folder: Path, side: int, images: int, seed: int) -> None:
    """Write ``clean.npy`` (n, H, W, 3), ``classes.npy`` (n,), ``NAME.npy`` (S, n, H, W, 3) and ``index.json``, last.

    Every kind and severity has a seed of its own, so the same sets come out whenever they are made.
    """
    if (folder / "index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    clean, classes, class_names = _clean(val, side, images)
    _save(folder / "clean.npy", clean)
    _save(folder / "classes.npy", classes)
    floats = torch.from_numpy(clean).permute(0, 3, 1, 2).float() / 255
    kinds = [kind for family in KINDS.values() for kind in family]
    for number, kind in enumerate(kinds):
        make, strengths = KINDS[family_of(kind)][kind]
        levels = []
        for severity, strength in enumerate(strengths):
            # kornia draws from torch's own generator.
            torch.manual_seed(seed * 10_000 + number * 100 + severity)
            levels.append(_bytes(torch.cat([make(strength)(part) for part in floats.split(100)])))
        _save(folder / f"{kind.replace(' ', '-')}.npy", np.stack(levels))
    atomic_write(folder / "index.json", canonical_json({"kinds": kinds, "class_names": list(class_names)}))


def _clean(val: str, side: int, images: int) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Evenly spread validation images as evaluation shows them."""
    beton = ensure_beton(val)
    chosen = np.unique(np.linspace(0, len(beton) - 1, min(images, len(beton))).round().astype(np.int64))
    loader = TokenLoader(beton, ImageSettings((side, side), (0, 0, 0), (1, 1, 1)), 100, shuffle=False)
    views = center_views(beton.heights, beton.widths)
    batches = [_bytes(batch.images) for batch in loader.epoch(0, views, sample_ids=chosen)]
    return np.concatenate(batches), beton.class_ids[chosen], beton.class_names


def _bytes(images: Tensor) -> np.ndarray:
    """Floats in [0, 1], (n, 3, H, W) → uint8 (n, H, W, 3)."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, array)


@torch.inference_mode()
def measure_corrupted(model: nn.Module, class_names: tuple[str, ...], folder: Path) -> dict:
    """Top-1 of a model: ``clean`` on the same images uncorrupted, and for each kind one number a severity."""
    index = json.loads((folder / "index.json").read_text())
    numbers = np.array([class_names.index(name) for name in index["class_names"]])
    truth = torch.from_numpy(numbers[np.load(folder / "classes.npy")])
    model = model.eval().to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(model.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))

    def top1(pixels: np.ndarray) -> float:
        hits = 0
        for start in range(0, len(pixels), 100):
            images = torch.from_numpy(pixels[start : start + 100]).permute(0, 3, 1, 2).float() / 255
            logits = model((images - mean) / std)[0]
            hits += int((logits.argmax(dim=1) == truth[start : start + 100]).sum())
        return hits / len(pixels)

    kinds = {kind: np.load(folder / f"{kind.replace(' ', '-')}.npy", mmap_mode="r") for kind in index["kinds"]}
    return {
        "clean": top1(np.load(folder / "clean.npy")),
        "kinds": {kind: [top1(np.array(level)) for level in levels] for kind, levels in kinds.items()},
    }
