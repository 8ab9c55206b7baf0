"""What a label set is worth to students, whether the set itself shows it, and what local and selected labels give.

    python -m tests.benchmarks.worth --out runs/emergence [--seeds 3] [--only ...]

Trains students of the demo's images on label sets of many kinds: of labelers that differ in training, size and
architecture (rows of `tests/benchmarks/emergence.py`, whose folder it shares), and on sets that are corrupted on
purpose. Each set labels two crops of each image, and each seed has its own labelers and students. Prints the sets'
scores, which need neither students nor masks, and their rank correlation (Spearman) with the gain over a student
without labels. That one sees a new crop in each epoch, of 40 to 100 % of the area, and the others two crops of 25 to
100 %, twice each: gains compare label sets with each other.

Resumable. A student takes 40 seconds on one core, a labeler one to two minutes.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import stl_offline as stl
from stl_offline.labels.foreground import measure_foreground
from stl_offline.labels.worth import measure_worth
from tests.benchmarks.emergence import ROWS, SHARED, changed, label, masks_of, train, write_images

STUDENT = {"epochs": 4, "val_every": 4}
Change = Callable[[stl.ShardArrays, np.random.Generator], dict[str, np.ndarray]]


def of_tokens(arrays: stl.ShardArrays, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of tokens, each changed alike."""
    return {name: change(getattr(arrays, name)) for name in ("class_ids", "logits", "confidence")}


def shuffle_tokens(arrays: stl.ShardArrays, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Each image's tokens in a random order."""
    n, views, height, width = arrays.confidence.shape
    order = draw.permuted(np.tile(np.arange(height * width), (n, 1)), axis=1)[:, None]

    def change(values: np.ndarray) -> np.ndarray:
        flat = values.reshape(n, views, height * width, -1)
        return np.take_along_axis(flat, order[..., None], axis=2).reshape(values.shape)

    return of_tokens(arrays, change)


def mirror(arrays: stl.ShardArrays, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Maps mirrored from left to right, as of a flip that was not recorded."""
    return of_tokens(arrays, lambda values: np.ascontiguousarray(values[:, :, :, ::-1]))


def other_images(share: float) -> Change:
    """A share of the images has the maps of other images."""

    def change(arrays: stl.ShardArrays, draw: np.random.Generator) -> dict[str, np.ndarray]:
        rows = np.arange(len(arrays))
        chosen = draw.choice(len(arrays), round(share * len(arrays)), replace=False)
        rows[chosen] = np.roll(chosen, 1)
        return of_tokens(arrays, lambda values: values[rows])

    return change


def same_class(arrays: stl.ShardArrays, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Every image has the map of another image of its class."""
    rows = np.arange(len(arrays))
    for class_id in np.unique(arrays.class_id):
        members = draw.permutation(np.flatnonzero(arrays.class_id == class_id))
        rows[members] = np.roll(members, 1)
    return of_tokens(arrays, lambda values: values[rows])


def own_class(arrays: stl.ShardArrays, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Every token has the image's class, with a probability of 0.9."""
    k = arrays.class_ids.shape[-1]
    classes = int(arrays.class_ids.max()) + 1
    ids = (arrays.class_id[:, None] + np.arange(k)) % classes
    ids = np.broadcast_to(ids[:, None, None, None], arrays.class_ids.shape).astype(arrays.class_ids.dtype)
    logits = np.full(arrays.logits.shape, np.log(0.1 / 0.9 / (k - 1)), arrays.logits.dtype)
    logits[..., 0] = 0
    return {"class_ids": ids.copy(), "logits": logits, "confidence": np.full_like(arrays.confidence, 0.9)}


@dataclasses.dataclass(frozen=True)
class Labels:
    """A label set, two crops per image: the labeler's row, the side of the crops, and how the set is corrupted."""

    row: str
    side: int = 64
    change: Change | None = None
    student: dict[str, Any] = dataclasses.field(default_factory=dict)


SETS = {
    "lme": Labels("lme-w5-e8"),
    "mean": Labels("mean-w5-e8"),
    "the image's class everywhere": Labels("lme-w5-e8", change=own_class),
    "lme, shuffled tokens": Labels("lme-w5-e8", change=shuffle_tokens),
    "lme, mirrored": Labels("lme-w5-e8", change=mirror),
    "lme, 30 % of other images": Labels("lme-w5-e8", change=other_images(0.3)),
    "lme, other images of the class": Labels("lme-w5-e8", change=same_class),
    "mean, weight 1, 2 epochs": Labels("mean-w1-e2"),
    "timm's test_vit": Labels("timm-vit"),
    "lme, 15 epochs": Labels("lme-w5-e15"),
    "mean, weight 1, 5 epochs": Labels("mean-w1-e5"),
}
SELECTED = {
    "lme, --select own": Labels("lme-w5-e8", student={"select": "own"}),
    "lme, --select confident:0.77": Labels("lme-w5-e8", student={"select": "confident:0.77"}),
}


def make(labels: Labels, name: str, seed: int, out: Path) -> stl.LabelSet:
    """The label set of the training images, made where it is not there."""
    with changed(ROWS[labels.row]):
        train(labels.row, seed, out)
        clean = label(labels.row, seed, out, "train", labels.side, crops_per_image=2)
    if labels.change is None:
        return clean
    folder = out / "worth" / f"{slug(name)}-seed{seed}" / "labels"
    draw = np.random.default_rng(seed)
    with stl.LabelSetWriter(folder, clean.spec, [shard.samples for shard in clean.shards]) as writer:
        if not writer.complete:
            for index in range(len(clean.shards)):
                arrays = clean.read_shard(index)
                writer.write_shard(index, dataclasses.replace(arrays, **labels.change(arrays, draw)))
            writer.finish()
    return stl.open_label_set(folder)


def slug(name: str) -> str:
    """A name as part of a path."""
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def student(name: str, seed: int, out: Path, labels: str = "none", **settings: Any) -> float:
    """A student's top-1."""
    images = out / "images"
    config = stl.StudentConfig(
        data=str(images / "train"),
        val=str(images / "val"),
        labels=labels,
        out=str(out / "worth" / f"{slug(name)}-seed{seed}" / "student"),
        seed=seed,
        **SHARED | STUDENT | settings,
    )
    return stl.train_student(config)["top1"]


def kept(label_set: stl.LabelSet, select: str) -> float:
    """The share of the tokens that ``select`` keeps; of "own", whose draws decide, on average."""
    rule, _, least = select.partition(":")
    shares = []
    for label_map in label_set.values():
        if rule == "own":
            shares.append(label_map.dense("uniform")[..., label_map.class_id].mean())
        else:
            shares.append((label_map.confidence >= float(least or 0)).mean())
    return float(np.mean(shares))


def scores(label_set: stl.LabelSet) -> dict[str, float]:
    """What the set alone shows, mean over its maps. Higher is meant to be better."""
    rows = []
    for label_map in label_set.values():
        dense, own = label_map.dense("uniform"), label_map.class_id
        best, mass = dense.argmax(-1), dense[..., own]
        mean = dense.mean((0, 1, 2))
        pairs = [(best[:, 1:], best[:, :-1]), (best[:, :, 1:], best[:, :, :-1])]
        same = np.concatenate([(first == second).ravel() for first, second in pairs])
        entropy = -(dense * np.log(np.maximum(dense, 1e-9))).sum(-1).mean()
        rows.append(
            {
                "tokens of the class": float((best == own).mean()),
                "images of the class": float(mean.argmax() == own),
                "log-likelihood of the class": float(np.log(max(mean[own], 1e-9))),
                "confidence": float(dense.max(-1).mean()),
                "minus entropy": -float(entropy),
                "neighbours agree": float(same.mean()),
                "spread of the class": float(mass.std(axis=(1, 2)).mean()),
            }
        )
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    agreeing = measure_worth(label_set)
    means["views correlate"], means["labels stats --worth"] = agreeing.agreement, agreeing.score
    means["minus calibration error"] = -abs(means["confidence"] - means["tokens of the class"])
    means["class × neighbours"] = means["images of the class"] * means["neighbours agree"]
    return means


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder of tests.benchmarks.emergence")
    parser.add_argument("--only", nargs="+", choices=(*SETS, *SELECTED), default=(*SETS, *SELECTED))
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--val", type=int, default=500)
    options = parser.parse_args()
    out, seeds = options.out, range(options.first, options.first + options.seeds)
    if not (out / "images" / "masks-train.json").exists():  # photos
        write_images(out, options.train, options.val)
    masks = masks_of(out, "train")
    none = np.array([student("none", seed, out) for seed in seeds])
    print(f"students without labels: {', '.join(f'{top1:.1%}' for top1 in none)}", flush=True)
    gains: dict[str, list[float]] = {}
    measured: dict[str, list[dict[str, float]]] = {}
    for name in options.only:
        labels = (SETS | SELECTED)[name]
        gains[name], measured[name], shown, shares = [], [], [], []
        for seed, base in zip(seeds, none, strict=True):
            label_set = make(labels, name, seed, out)
            gains[name].append(student(name, seed, out, str(label_set.place), **labels.student) - base)
            measured[name].append(scores(label_set))
            shown.append(measure_foreground(label_set, masks).auroc)
            shares.append(kept(label_set, labels.student.get("select", "all")))
        found = gains[name] + none
        means = {score: np.mean([each[score] for each in measured[name]]) for score in measured[name][0]}
        if len(measured) == 1:
            heads = ["labels", "student", "gain in each seed", "tokens used", "AUROC", *means]
            print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        deviation = f" ± {found.std(ddof=1):.1%}" if len(found) > 1 else ""
        cells = [f"{found.mean():.1%}{deviation}", f"{np.mean(shares):.0%}"]
        cells.insert(1, ", ".join(f"{100 * gain:.1f}" for gain in gains[name]))
        cells.append(f"{np.mean(shown):.2f}")
        cells += [f"{mean:.3f}" for mean in means.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    for name in SELECTED:
        if len(seeds) > 1 and {name, "lme"} <= gains.keys():
            more = 100 * np.subtract(gains[name], gains["lme"])
            print(f"{name}: {more.mean():+.1f} points over all tokens (SE {more.std(ddof=1) / len(more) ** 0.5:.1f})")
    names = [name for name in options.only if name in SETS]
    if len(names) > 2:
        heads = [f"seed {seed}" for seed in seeds]
        print(f"| score | {' | '.join(heads)} | mean of the seeds |\n|{'---|' * (2 + len(heads))}")
        for score in measured[names[0]][0]:
            values = np.array([[each[score] for each in measured[name]] for name in names])
            gain = np.array([gains[name] for name in names])
            rank = [spearmanr(values[:, column], gain[:, column])[0] for column in range(len(seeds))]
            rank.append(spearmanr(values.mean(1), gain.mean(1))[0])
            print(f"| {score} | {' | '.join(f'{each:.2f}' for each in rank)} |")


if __name__ == "__main__":
    main()
