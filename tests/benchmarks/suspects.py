"""Whether token labels find wrong classes: 5 % of the training images' classes are changed on purpose.

    python -m tests.benchmarks.suspects --train tiny20-train.tar --out runs/suspects [--seeds 3] [--epochs 10]

The labeler is trained on the changed classes, as a user's would be, and labels the same images under crops. The most
doubtful images, as many as were changed, are compared with those that were. Resumable.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np

import stl_offline as stl
from stl_offline.labels.suspects import find_suspects

PART = 0.05


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


def run(seed: int, options: argparse.Namespace) -> tuple[float, float, int]:
    """(precision, its bound by chance, images changed)."""
    out = options.out / f"seed{seed}"
    changed = write_changed(options.train, out / "images", seed)
    shared = {"data": str(out / "images"), "workers": 1}
    labeler = str(out / "labeler")
    stl.train_labeler(
        stl.LabelerConfig(
            out=labeler, img_size=64, epochs=options.epochs, batch_size=64, lr=1e-3, amp="bf16", seed=seed, **shared
        )
    )
    labels = str(out / "labels")
    dump = {"crops_per_image": options.views, "top_k": 5, "seed": seed if options.views else 0}
    stl.dump_labels(stl.DumpConfig(labeler=labeler, out=labels, **dump, **shared))
    found = find_suspects(stl.open_label_set(labels), len(changed))
    return len(changed & {suspect.key for suspect in found}) / len(changed), PART, len(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="tar of SPLIT/CLASS/FILE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--views", type=int, default=2, help="crops per image (0: the whole image)")
    options = parser.parse_args()
    print("| seed | changed | precision | by chance |\n|---|---|---|---|")
    for seed in range(options.seeds):
        precision, chance, changed = run(seed, options)
        print(f"| {seed} | {changed} | {precision:.3f} | {chance:.3f} |", flush=True)


if __name__ == "__main__":
    main()
