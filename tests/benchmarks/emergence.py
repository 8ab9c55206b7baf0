"""Whether a labeler's tokens outline the object though no token was ever labelled, and what moves that.

    python -m tests.benchmarks.emergence --out runs/emergence [--only lme-w5-e8 mean-w5-e8] [--seeds 3]

Trains labelers on the embedded data set, labels its validation images whole, and compares with the objects' masks:

- top-1 and token top-1 of the labeler;
- AUROC of a token's probability of the image's own class against the part of its cell that the mask covers, mean over
  images (0.5: the labels show nothing of where the object is);
- contrast: tokens that are confident (over 0.5) of the own class, as a share of those inside ÷ of those outside.

Resumable: a run that is complete is not trained again. A row takes two to four minutes on one core.
"""

import argparse
import statistics
from pathlib import Path

import numpy as np

import stl_offline as stl
from stl_offline.demo.shapes import read_masks, write_shapes

SIZE, BATCH = 64, 20
CONFIDENT = 0.5
ROWS = {
    "mean-w1-e5": {"epochs": 5},
    "mean-w5-e8": {"epochs": 8, "token_weight": 5.0},
    "mean-w5-e8-cutmix": {"epochs": 8, "token_weight": 5.0, "cutmix": 1.0},
    "lme-w1-e8": {"epochs": 8, "token_pool": "lme"},
    "lme-w5-e8": {"epochs": 8, "token_weight": 5.0, "token_pool": "lme"},
    "lme-w5-e8-cutmix": {"epochs": 8, "token_weight": 5.0, "token_pool": "lme", "cutmix": 1.0},
    "lme-w5-e15": {"epochs": 15, "token_weight": 5.0, "token_pool": "lme"},
}


def cell_means(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The part of each cell of a grid that a mask (H, W) covers; the grid divides the mask's sides."""
    height, width = (side // cells for side, cells in zip(mask.shape, grid, strict=True))
    return mask.reshape(grid[0], height, grid[1], width).mean(axis=(1, 3))


def auroc(scores: np.ndarray, inside: np.ndarray) -> float:
    """Area under the ROC curve of scores (n,) for cells that are inside by a part in [0, 1]; ties count half."""
    levels, place = np.unique(scores, return_inverse=True)
    positive = np.bincount(place, inside, len(levels))
    negative = np.bincount(place, 1 - inside, len(levels))
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / (inside.sum() * (1 - inside).sum()))


def measure(labels: stl.LabelSet, masks: dict[str, np.ndarray]) -> tuple[float, float]:
    """(AUROC, contrast) of whole-image labels."""
    areas, hits, cells = [], np.zeros(2), np.zeros(2)
    for key, label_map in labels.items():
        inside = cell_means(masks[key], labels.spec.grid).ravel()
        own = label_map.class_ids[0] == label_map.class_id
        probability = (label_map.probabilities()[0] * own).sum(-1).ravel()
        areas.append(auroc(probability, inside))
        confident = (own[..., 0] & (label_map.confidence[0] >= CONFIDENT)).ravel()
        for part, weight in enumerate((inside, 1 - inside)):
            hits[part] += (confident * weight).sum()
            cells[part] += weight.sum()
    shares = hits / cells
    return statistics.fmean(areas), float(shares[0] / max(shares[1], 1e-9))


def run(name: str, seed: int, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """(top-1, token top-1, AUROC, contrast) of one row and seed."""
    data = options.out / "images"
    folder = options.out / f"{name}-seed{seed}"
    shared = {"img_size": SIZE, "batch_size": BATCH, "lr": 1e-3, "scale_min": 0.4, "seed": seed, "workers": 1}
    settings = shared | ROWS[name] | ({"epochs": options.epochs} if options.epochs else {})
    config = stl.LabelerConfig(data=str(data / "train"), val=str(data / "val"), out=str(folder / "run"), **settings)
    summary = stl.train_labeler(config)
    stl.dump_labels(
        stl.DumpConfig(data=str(data / "val"), labeler=config.out, out=str(folder / "labels"), top_k=10, workers=1)
    )
    return (
        summary["top1"],
        summary["token_top1"],
        *measure(stl.open_label_set(folder / "labels"), read_masks(data, "val")),
    )


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
    print("| labeler | seeds | top-1 | token top-1 | AUROC | contrast |\n|---|---|---|---|---|---|")
    for name in options.only:
        found = np.array([run(name, seed, options) for seed in range(options.seeds)])
        means, spread = found.mean(axis=0), found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(4)
        cells = [f"{mean:.1%} ± {std:.1%}" for mean, std in zip(means[:2], spread[:2], strict=True)]
        cells += [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(means[2:], spread[2:], strict=True)]
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
