"""Whether a labeler's tokens outline the object though no token was ever labelled, and what moves that.

    python -m tests.benchmarks.emergence --out runs/emergence [--only lme-w5-e8 mean-w5-e8] [--seeds 3]
    python -m tests.benchmarks.emergence --out runs/photos --photos tiny20-train.tar tiny20-val.tar tiny20-boxes.json

Trains labelers on the embedded data set, or on photos, labels its validation images whole, and compares with the
objects' masks, or boxes:

- top-1 and token top-1 of the labeler;
- AUROC and contrast, as `stl-offline labels stats --masks` defines them, of labels at the side of training;
- AUROC of two crops of each image; of whole images at half as much again as the side of training, with its contrast,
  and there of the smallest and the largest third of the objects.

Resumable: a run that is complete is not trained again. Most rows take one to two minutes on one core.
"""

import argparse
import contextlib
import json
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import stl_offline as stl
from stl_offline.demo.shapes import write_shapes
from stl_offline.images.masks import read_masks
from stl_offline.labels.foreground import measure_foreground
from stl_offline.models import blocks, variants
from stl_offline.training import train_labeler as stage_1

COLUMNS = (
    "top-1",
    "token top-1",
    "AUROC",
    "contrast",
    "AUROC of crops",
    "AUROC, 1.5 × side",
    "contrast",
    "small objects",
    "large objects",
)
MODEL = "fan_micro_4_p8"
SHARED = {"img_size": 64, "batch_size": 20, "lr": 1e-3, "scale_min": 0.4, "workers": 1, "amp": "none"}


@dataclass(frozen=True)
class Row:
    """How a labeler differs from the demo's.

    settings: of `LabelerConfig`; model: fields of the FAN's architecture; pool: a pooling that the package does not
    have, in place of log-mean-exp; scenes: whether half of each training image is another image (`write_scenes`);
    class_apart: whether the class head learns from the tokens without changing them.
    """

    settings: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    pool: Any = None
    scenes: bool = False
    class_apart: bool = False


def lme(**changes: Any) -> dict[str, Any]:
    """The settings of the base: log-mean-exp, token weight 5, 8 epochs."""
    return {"epochs": 8, "token_weight": 5.0, "token_pool": "lme"} | changes


def top_quarter(token_logits_BNK: Any, pool: str) -> Any:
    """Mean of each class's highest quarter of the token logits."""
    return token_logits_BNK.topk(max(1, token_logits_BNK.shape[1] // 4), dim=1).values.mean(1)


ROWS = {
    "mean-w1-e2": Row({"epochs": 2}),
    "mean-w1-e5": Row({"epochs": 5}),
    "mean-w1-e15": Row({"epochs": 15}),
    "mean-w1-e15-cutmix": Row({"epochs": 15, "cutmix": 1.0}),
    "mean-w1-e15-cutmix-erase": Row({"epochs": 15, "cutmix": 1.0, "mix_mode": "elem", "random_erase": 0.5}),
    "mean-w5-e15-cutmix": Row({"epochs": 15, "token_weight": 5.0, "cutmix": 1.0}),
    "mean-w5-e10-cutmix-128": Row({"epochs": 10, "token_weight": 5.0, "cutmix": 1.0, "img_size": 128}),
    "mean-w5-e8": Row({"epochs": 8, "token_weight": 5.0}),
    "mean-w5-e8-cutmix": Row({"epochs": 8, "token_weight": 5.0, "cutmix": 1.0}),
    "lme-w5-e4": Row(lme(epochs=4)),
    "lme-w5-e8": Row(lme()),
    "lme-w5-e15": Row(lme(epochs=15)),
    "lme-w5-e8-cutmix": Row(lme(cutmix=1.0)),
    "lme-w1-e8": Row(lme(token_weight=1.0)),
    "lme-w20-e8": Row(lme(token_weight=20.0)),
    "lme-smoothing-0": Row(lme(smoothing=0.0)),
    "lme-scale-0.08": Row(lme(scale_min=0.08)),
    "lme-scale-1": Row(lme(scale_min=1.0)),
    "lme-depth-2": Row(lme(), {"depth": 2}),
    "lme-depth-8": Row(lme(), {"depth": 8}),
    "lme-stride-16": Row(lme(), {"patch_size": 16}),
    "lme-stride-4": Row(lme(), {"patch_size": 4}),
    "lme-class-apart": Row(lme(), class_apart=True),
    "mean-class-apart": Row({"epochs": 8, "token_weight": 5.0}, class_apart=True),
    "lme-side-96": Row(lme(img_size=96)),
    "lme-hybrid-96": Row(lme(img_size=96), {"hybrid_depths": (1, 1)}),
    "top-quarter": Row(lme(), pool=top_quarter),
    "mean-scenes": Row({"epochs": 8, "token_weight": 5.0}, scenes=True),
    "lme-scenes": Row(lme(), scenes=True),
    "lme-scenes-e24": Row(lme(epochs=24), scenes=True),
    "timm-vit": Row({"epochs": 10, "token_weight": 5.0, "model": "test_vit", "token_pool": "lme"}),
}


def by_size(masks: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The masks of the smallest and of the largest third of the objects."""
    keys = sorted(masks, key=lambda key: masks[key].mean())
    third = len(keys) // 3
    return [{key: masks[key] for key in part} for part in (keys[:third], keys[-third:])]


def write_images(out: Path, train: int, val: int) -> Path:
    """The drawn images of all rows."""
    return write_shapes(out / "images", train=train, val=val, seed=0, size=64)


def write_photos(out: Path, train: Path, val: Path, boxes: Path) -> Path:
    """Photos instead: tars of SPLIT/CLASS/FILE, 64 pixels a side, and each one's box, its last pixel included."""
    images = out / "images"
    if images.exists():
        return images
    part = out / "images.part"
    found = json.loads(boxes.read_bytes())["boxes_xyxy_in_64px"]
    for split, tar in (("train", train), ("val", val)):
        with tarfile.open(tar) as source:
            source.extractall(part, filter="data")
        shares = {}
        for key, (left, top, right, bottom) in found.items():
            folder, _, name = key.partition("/")
            if folder == split:
                shares[name] = [left / 64, top / 64, (right + 1) / 64, (bottom + 1) / 64]
        (part / f"masks-{split}.json").write_text(json.dumps(shares))
    part.rename(images)
    return images


def masks_of(out: Path, split: str) -> Mapping[str, np.ndarray]:
    """Where the objects of a split's images are."""
    file = out / "images" / f"masks-{split}.json"
    return read_masks(file if file.exists() else file.with_suffix(".npz"))


def write_scenes(images: Path, out: Path) -> Path:
    """Training images of two objects: each is set beside one of another class, in an image twice as wide.

    The class is that of the left half in half of the images, of the right half in the others, so that the other half
    holds an object of a class that the image is not labelled with.
    """
    if out.exists():
        return out
    part = out.with_suffix(".part")
    files = sorted((images / "train").glob("*/*.jpg"))
    draw = np.random.default_rng(0)
    for number, file in enumerate(files):
        other = file
        while other.parent == file.parent:
            other = files[draw.integers(len(files))]
        pair = (file, other) if number % 2 else (other, file)
        scene = np.concatenate([np.asarray(Image.open(each)) for each in pair], axis=1)
        place = part / file.parent.name / file.name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene).save(place, quality=95, subsampling=0)
    part.rename(out)
    return out


@contextlib.contextmanager
def changed(row: Row) -> Iterator[None]:
    """The micro FAN's architecture, and the pooling of stage 1, as a row has them."""
    arguments = variants._ALL[f"{MODEL}_token"]
    before, pool, attend = dict(arguments), stage_1.pool_tokens, blocks.ClassAttention.forward
    arguments.update(row.model)
    stage_1.pool_tokens = row.pool or pool
    if row.class_apart:
        # The class token reads the tokens here alone.
        blocks.ClassAttention.forward = lambda self, cls_B1C, tokens_BNC: attend(self, cls_B1C, tokens_BNC.detach())
    try:
        yield
    finally:
        arguments.clear()
        arguments.update(before)
        stage_1.pool_tokens = pool
        blocks.ClassAttention.forward = attend


def train(name: str, seed: int, out: Path, epochs: int = 0) -> dict[str, Any]:
    """The summary of a row's labeler, which is trained into OUT/NAME-seedSEED/run."""
    row, run = ROWS[name], out / f"{name}-seed{seed}" / "run"
    images = out / "images"
    data = write_scenes(images, out / "scenes") if row.scenes else images / "train"
    settings = SHARED | row.settings | ({"epochs": epochs} if epochs else {})
    return stl.train_labeler(
        stl.LabelerConfig(data=str(data), val=str(images / "val"), out=str(run), seed=seed, **settings)
    )


def label(name: str, seed: int, out: Path, split: str, side: int, **settings: Any) -> stl.LabelSet:
    """Labels of a split by a row's labeler."""
    folder = out / f"{name}-seed{seed}"
    labels = folder / "-".join(["labels", split, str(side), *(f"{key}{value}" for key, value in settings.items())])
    dump = {"top_k": 10, "workers": 1, "batch_size": 50} | settings
    stl.dump_labels(
        stl.DumpConfig(
            data=str(out / "images" / split), labeler=str(folder / "run"), img_size=side, out=str(labels), **dump
        )
    )
    return stl.open_label_set(labels)


def run(name: str, seed: int, out: Path, epochs: int = 0) -> list[float]:
    """The figures of one row and seed, in the order of the table."""
    side = (SHARED | ROWS[name].settings)["img_size"]
    with changed(ROWS[name]):
        summary = train(name, seed, out, epochs)
        small = label(name, seed, out, "val", side)
        crops = label(name, seed, out, "val", side, crops_per_image=2)
        large = label(name, seed, out, "val", side * 3 // 2)
    masks = masks_of(out, "val")
    shown = [measure_foreground(labels, masks) for labels in (small, crops, large)]
    thirds = [measure_foreground(large, part).auroc for part in by_size(masks)]
    contrasts = shown[0].contrast, shown[2].contrast
    return [
        summary["top1"],
        summary["token_top1"],
        shown[0].auroc,
        contrasts[0],
        shown[1].auroc,
        shown[2].auroc,
        contrasts[1],
        *thirds,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=1600)
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=0, help="instead of a row's own, to try the script")
    parser.add_argument(
        "--photos", type=Path, nargs=3, metavar=("TRAIN", "VAL", "BOXES"), help="two tars and a JSON file"
    )
    options = parser.parse_args()
    if options.photos:
        write_photos(options.out, *options.photos)
    else:
        write_images(options.out, options.train, options.val)
    print(f"| labeler | seeds | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for name in options.only:
        found = np.array([run(name, seed, options.out, options.epochs) for seed in range(options.seeds)])
        forms = ["{:.1%}"] * 2 + ["{:.2f}"] * (len(COLUMNS) - 2)
        cells = [form.format(mean) for form, mean in zip(forms, found.mean(axis=0), strict=True)]
        if len(found) > 1:  # of one seed there is no deviation
            spread = found.std(axis=0, ddof=1)
            cells = [f"{cell} ± {form.format(std)}" for cell, form, std in zip(cells, forms, spread, strict=True)]
        print(f"| {name} | {len(found)} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
