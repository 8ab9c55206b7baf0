"""Whether token labels find wrong classes: 5 % of the training images' classes are changed on purpose.

    python -m tests.benchmarks.suspects --train tiny20-train.tar --out runs/suspects [--first 0] [--seeds 3]
    python -m tests.benchmarks.suspects --train tiny20-train.tar --out runs/suspects --pretrained WEIGHTS.pth

The labeler is trained on the changed classes, as a user's would be, and labels the same images: a small FAN from
scratch, which labels crops; or the heads alone on EfficientNet-Lite0's frozen ImageNet weights
(`tests/benchmarks/lite0.py`), which labels whole images. The most doubtful images, as many as were changed, are
compared with those that were. Beside `labels stats --suspects`, which ranks by the ratio of the probabilities of
another class and the own one, stand the difference of the two, and the own class's probability. Resumable.
"""

import argparse
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

import stl_offline as stl
from stl_offline.labels.suspects import find_suspects
from tests.benchmarks.lite0 import LITE0, lite0_start

PART = 0.05
SCORES = {
    "difference": lambda own, other: other - own,
    "own class": lambda own, other: -own,
}


def write_changed(tar: Path, folder: Path, seed: int) -> set[str]:
    """Unpack SPLIT/CLASS/FILE into class folders, some in another class's; the keys of these."""
    with tarfile.open(tar) as source:
        members = sorted((member for member in source.getmembers() if member.isfile()), key=lambda each: each.name)
        names = sorted({member.name.split("/")[-2] for member in members})
        draw = np.random.default_rng(seed)
        chosen = set(draw.choice(len(members), round(PART * len(members)), replace=False).tolist())
        changed = set()
        for number, member in enumerate(members):
            name, file = member.name.split("/")[-2:]
            if number in chosen:
                name = names[(names.index(name) + int(draw.integers(1, len(names)))) % len(names)]
                changed.add(f"{name}/{file}")
            place = folder / name / file
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(source.extractfile(member).read())
    return changed


def from_scratch(images: Path, out: Path, seed: int, epochs: int) -> stl.LabelSet:
    """Two crops of each image, labelled by a small FAN."""
    shared = {"data": str(images), "workers": 1}
    labeler, labels = str(out / "labeler"), str(out / "labels")
    stl.train_labeler(
        stl.LabelerConfig(
            out=labeler, img_size=64, epochs=epochs, batch_size=64, lr=1e-3, amp="none", seed=seed, **shared
        )
    )
    stl.dump_labels(stl.DumpConfig(labeler=labeler, out=labels, crops_per_image=2, top_k=5, seed=seed, **shared))
    return stl.open_label_set(labels)


def from_pretrained(images: Path, out: Path, seed: int, weights: Path) -> stl.LabelSet:
    """Whole images, labelled by heads that one epoch trained on EfficientNet-Lite0's frozen trunk."""
    init = lite0_start(weights, out / "lite0.safetensors")
    shared = {"data": str(images), "workers": 1, "img_size": 128, "interpolation": "bicubic"}
    labeler, labels = str(out / "lite0"), str(out / "lite0-labels")
    stl.train_labeler(
        stl.LabelerConfig(
            out=labeler,
            model=LITE0,
            init=init,
            freeze=True,
            epochs=1,
            batch_size=64,
            lr=3e-3,
            scale_min=0.5,
            color_jitter=0.0,
            amp="none",
            seed=seed,
            **shared,
        )
    )
    stl.dump_labels(stl.DumpConfig(labeler=labeler, out=labels, top_k=20, **shared))
    return stl.open_label_set(labels)


def precisions(label_set: stl.LabelSet, changed: set[str]) -> list[float]:
    """The share of the changed images among the most doubtful ones: of `find_suspects`, then of each of `SCORES`."""
    count = len(changed)
    found = [{suspect.key for suspect in find_suspects(label_set, count)}]
    keys, pairs = [], []
    for key, label_map in label_set.items():
        means = label_map.dense("uniform").mean((0, 1, 2))
        keys.append(key)
        pairs.append((means[label_map.class_id], np.delete(means, label_map.class_id).max()))
    own, other = np.array(pairs).T
    score: Callable[[np.ndarray, np.ndarray], np.ndarray]
    for score in SCORES.values():
        found.append({keys[row] for row in np.argsort(-score(own, other), kind="stable")[:count]})
    return [len(changed & each) / count for each in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="tar of SPLIT/CLASS/FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pretrained", type=Path, metavar="FILE", help="EfficientNet-Lite0's weights")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of the FAN from scratch")
    options = parser.parse_args()
    print(f"| seed | changed | by chance | ratio | {' | '.join(SCORES)} |\n|{'---|' * (4 + len(SCORES))}")
    for seed in range(options.first, options.first + options.seeds):
        out = options.out / f"seed{seed}"
        changed = write_changed(options.train, out / "images", seed)
        if options.pretrained:
            label_set = from_pretrained(out / "images", out, seed, options.pretrained)
        else:
            label_set = from_scratch(out / "images", out, seed, options.epochs)
        found = precisions(label_set, changed)
        print(f"| {seed} | {len(changed)} | {PART} | {' | '.join(f'{each:.3f}' for each in found)} |", flush=True)


if __name__ == "__main__":
    main()
