"""Whether a labeler's tokens outline the object though no token was ever labelled, and what moves that.

    python -m tests.benchmarks.emergence --out runs/emergence [--only lme-w5-e8 mean-w5-e8] [--seeds 3]

Trains labelers on the embedded data set, labels its validation images whole, and compares with the objects' masks:

- top-1 and token top-1 of the labeler;
- AUROC and contrast, as `stl-offline labels stats --masks` defines them.

Labels are made at the side of training and at half as much again.

Resumable: a run that is complete is not trained again. A row takes two to four minutes on one core.
"""

import argparse
from pathlib import Path

import numpy as np

import stl_offline as stl
from stl_offline.demo.shapes import write_shapes
from stl_offline.images.masks import read_masks
from stl_offline.labels.foreground import measure_foreground

SIZE, BATCH = 64, 20
SIDES = (64, 96)
ROWS = {
    "mean-w1-e5": {"epochs": 5},
    "mean-w5-e8": {"epochs": 8, "token_weight": 5.0},
    "mean-w5-e8-cutmix": {"epochs": 8, "token_weight": 5.0, "cutmix": 1.0},
    "lme-w1-e8": {"epochs": 8, "token_pool": "lme"},
    "lme-w5-e8": {"epochs": 8, "token_weight": 5.0, "token_pool": "lme"},
    "lme-w5-e8-cutmix": {"epochs": 8, "token_weight": 5.0, "token_pool": "lme", "cutmix": 1.0},
    "lme-w5-e15": {"epochs": 15, "token_weight": 5.0, "token_pool": "lme"},
}


def run(name: str, seed: int, options: argparse.Namespace) -> list[float]:
    """Top-1, token top-1, then AUROC and contrast of labels at each of `SIDES`, of one row and seed."""
    data = options.out / "images"
    folder = options.out / f"{name}-seed{seed}"
    shared = {"img_size": SIZE, "batch_size": BATCH, "lr": 1e-3, "scale_min": 0.4, "seed": seed, "workers": 1}
    settings = shared | ROWS[name] | ({"epochs": options.epochs} if options.epochs else {})
    config = stl.LabelerConfig(data=str(data / "train"), val=str(data / "val"), out=str(folder / "run"), **settings)
    summary = stl.train_labeler(config)
    figures = [summary["top1"], summary["token_top1"]]
    masks = read_masks(data / "masks-val.npz")
    for side in SIDES:
        labels = str(folder / f"labels-{side}")
        stl.dump_labels(
            stl.DumpConfig(data=str(data / "val"), labeler=config.out, img_size=side, out=labels, top_k=10, workers=1)
        )
        shown = measure_foreground(stl.open_label_set(labels), masks)
        figures += [shown.auroc, shown.contrast]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--val", type=int, default=300)
    parser.add_argument("--epochs", type=int, default=0, help="instead of a row's own, to try the script")
    options = parser.parse_args()
    write_shapes(options.out / "images", train=options.train, val=options.val, seed=0, size=SIZE)
    sides = "".join(f" AUROC at {side} px | contrast |" for side in SIDES)
    print(f"| labeler | seeds | top-1 | token top-1 |{sides}\n|{'---|' * (4 + 2 * len(SIDES))}")
    for name in options.only:
        found = np.array([run(name, seed, options) for seed in range(options.seeds)])
        spread = found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(found.shape[1])
        means = list(zip(found.mean(axis=0), spread, strict=True))
        cells = [f"{mean:.1%} ± {std:.1%}" for mean, std in means[:2]]
        cells += [f"{mean:.2f} ± {std:.2f}" for mean, std in means[2:]]
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
