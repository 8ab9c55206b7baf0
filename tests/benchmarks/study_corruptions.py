"""Corrupted validation images: the benchmark's 15 kinds as `stl_offline.evaluation` generates them, three severities.

Generated corruptions are not ImageNet-C: these images are 64 px. n: images; S: severities.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from stl_offline.evaluation import corrupt, parse_corruptions
from stl_offline.files import atomic_path, atomic_write, canonical_json
from stl_offline.geometry import center_views
from stl_offline.images.pack import ensure_beton
from stl_offline.loader import ImageSettings, TokenLoader

# family → its kinds.
KINDS = {
    family: tuple(dict.fromkeys(kind for kind, _ in parse_corruptions(family)))
    for family in ("noise", "blur", "weather", "digital")
}
SEVERITIES = (1, 3, 5)


def make_corrupted(val: str, folder: Path, side: int, images: int, seed: int) -> None:
    """Write ``clean.npy`` (n, H, W, 3), ``classes.npy`` (n,), ``KIND.npy`` (S, n, H, W, 3) and ``index.json``, last.

    The same images come out whenever they are made: each is drawn by the seed, its key, the kind and the severity.
    """
    if (folder / "index.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    clean, classes, keys, class_names = _clean(val, side, images)
    _save(folder / "clean.npy", clean)
    _save(folder / "classes.npy", classes)
    kinds = [kind for family in KINDS.values() for kind in family]
    for kind in kinds:
        levels = [
            [corrupt(image, kind, severity, seed=seed, key=key) for image, key in zip(clean, keys, strict=True)]
            for severity in SEVERITIES
        ]
        _save(folder / f"{kind}.npy", np.array(levels))
    atomic_write(folder / "index.json", canonical_json({"kinds": kinds, "class_names": list(class_names)}))


def _clean(val: str, side: int, images: int) -> tuple[np.ndarray, np.ndarray, list[str], tuple[str, ...]]:
    """Evenly spread validation images as evaluation shows them, their classes and keys; the class names."""
    beton = ensure_beton(val)
    chosen = np.unique(np.linspace(0, len(beton) - 1, min(images, len(beton))).round().astype(np.int64))
    loader = TokenLoader(beton, ImageSettings((side, side), (0, 0, 0), (1, 1, 1)), 100, shuffle=False)
    views = center_views(beton.heights, beton.widths)
    batches = [_bytes(batch.images) for batch in loader.epoch(0, views, sample_ids=chosen)]
    keys = [beton.keys[index] for index in chosen]
    return np.concatenate(batches), beton.class_ids[chosen], keys, beton.class_names


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

    kinds = {kind: np.load(folder / f"{kind}.npy", mmap_mode="r") for kind in index["kinds"]}
    return {
        "clean": top1(np.load(folder / "clean.npy")),
        "kinds": {kind: [top1(np.array(level)) for level in levels] for kind, levels in kinds.items()},
    }
