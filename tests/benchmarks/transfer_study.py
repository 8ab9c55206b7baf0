"""Whether token labels help dense transfer: backbones pretrained with and without them, fine-tuned on masks or boxes.

    python -m tests.benchmarks.transfer_study --pretrain tiny180-train.tar --pretrain-val tiny180-val.tar \
        --masks camvid.tar --classes camvid.txt --ignore-id 11 --out runs/transfer [--seeds 3]

For each backbone and seed: a labeler; students with no token labels, with the labeler run in every step (online), and
with one class drawn per token of every crop, stored beforehand (draws); each fine-tuned with the same settings.
`random` starts from random weights. Scores on the splits train and val of the masks: mIoU, mIoU on corrupted images,
retention; then each arm's difference from `none`, with its standard error over seeds. ``--boxes bccd.tar`` with
``--classes RBC,WBC,Platelets`` instead of masks fine-tunes detectors and gives mAP. Everything is resumable: what is
complete is not done again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import stl_offline as stl
from stl_offline.config_transfer import DetectConfig, SegmentConfig, TransferEvaluateConfig
from stl_offline.transfer import evaluate_transfer, train_detector, train_segmenter

ARMS = ("random", "none", "online", "draws")
MACHINE = {"workers": 1, "device": "cpu"}


def pretrain(name: str, seed: int, arm: str, options: argparse.Namespace) -> str:
    """A pretrained run's folder."""
    folder = options.out / f"{name}-seed{seed}"
    shared = MACHINE | {
        "data": options.pretrain,
        "val": options.pretrain_val,
        "model": name,
        "img_size": options.pretrain_size,
        "epochs": options.pretrain_epochs,
        "seed": seed,
        "val_every": options.pretrain_epochs,
    }
    labeler = folder / "labeler"
    if arm in ("online", "draws"):
        stl.train_labeler(stl.LabelerConfig(**shared, token_pool="lme", out=str(labeler)))
    labels: dict[str, Any] = {"labels": "none"}
    if arm == "online":
        labels = {"labels": "online", "labeler": str(labeler)}
    if arm == "draws":
        crops = {"crops_per_image": options.pretrain_epochs, "top_k": 0, "draws": 1, "seed": seed}
        dump = stl.DumpConfig(
            data=options.pretrain, labeler=str(labeler), out=str(folder / "labels"), **crops, **MACHINE
        )
        stl.dump_labels(dump)
        labels = {"labels": dump.out}
    out = folder / arm
    summary = stl.train_student(stl.StudentConfig(**shared, **labels, out=str(out)))
    print(f"{name} seed {seed} {arm}: pretrained, top-1 {summary['top1']:.1%}", flush=True)
    return str(out)


def fine_tune(name: str, seed: int, arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Scores of one arm: clean, corrupted, retention."""
    backbone = f"timm:{name}" if arm == "random" else pretrain(name, seed, arm, options)
    kind = "frozen" if options.freeze else "tuned"
    run = options.out / f"{name}-seed{seed}" / f"{'masks' if options.masks else 'boxes'}-{arm}-{kind}"
    shared = MACHINE | {
        "split": "train",
        "val_split": "val",
        "classes": options.classes,
        "backbone": backbone,
        "freeze": options.freeze,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "seed": seed,
        "val_every": options.epochs,
        "out": str(run),
    }
    if options.masks:
        height, width = options.crop
        crop = {"crop_height": height, "crop_width": width, "head_width": options.head_width}
        more = {"data": options.masks, "val": options.masks, "ignore_id": options.ignore_id}
        train_segmenter(SegmentConfig(**shared, **crop, **more))
    else:
        more = {"data": options.boxes, "val": options.boxes, "side": options.side, "longest": 2 * options.side}
        train_detector(DetectConfig(**shared, **more, head_width=options.head_width))
    scores = run / f"scores-{options.corrupt.replace(':', '')}.json"
    if not scores.is_file():
        config = TransferEvaluateConfig(
            data=options.masks or options.boxes, split="val", checkpoint=str(run), corrupt=options.corrupt, **MACHINE
        )
        scores.write_text(json.dumps(evaluate_transfer(config)))
    found = json.loads(scores.read_text())
    main = "miou" if options.masks else "map"
    return {"clean": found[main], "corrupted": found[f"corrupted_{main}"], "retention": found["retention"] or 0.0}


def difference(ours: list[float], none: list[float]) -> str:
    """Mean difference of paired seeds, in points, and its standard error."""
    points = 100 * (np.array(ours) - np.array(none))
    error = "–" if len(points) < 2 else f"{points.std(ddof=1) / np.sqrt(len(points)):.1f}"
    return f"{points.mean():+.1f} (SE {error})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pretrain", required=True, help="images to pretrain on")
    parser.add_argument("--pretrain-val", required=True)
    parser.add_argument("--pretrain-size", type=int, default=64)
    parser.add_argument("--pretrain-epochs", type=int, default=40)
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--masks", help="images with masks, with the splits train and val")
    data.add_argument("--boxes", help="images with boxes, likewise")
    parser.add_argument("--classes", required=True)
    parser.add_argument("--ignore-id", type=int, default=255)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backbones", nargs="+", default=["fan_micro_4_p8", "fan_tiny_8_p4_hybrid"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--crop", type=int, nargs=2, default=[176, 240], help="height and width")
    parser.add_argument("--side", type=int, default=240, help="shorter side of images with boxes")
    parser.add_argument("--head-width", type=int, default=128)
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--corrupt", default="noise:3,blur:3,weather:3,digital:3")
    options = parser.parse_args()
    print(
        "| backbone | start | seeds | clean % | corrupted % | retention % | clean, above none | corrupted, above none |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in options.backbones:
        found = {arm: [fine_tune(name, seed, arm, options) for seed in range(options.seeds)] for arm in options.arms}
        columns = {arm: {key: [each[key] for each in rows] for key in rows[0]} for arm, rows in found.items()}
        for arm, values in columns.items():
            means = " | ".join(f"{100 * np.mean(values[key]):.1f}" for key in ("clean", "corrupted", "retention"))
            gaps = " | | "
            if arm != "none" and "none" in columns:
                gaps = " | ".join(difference(values[key], columns["none"][key]) for key in ("clean", "corrupted"))
            print(f"| {name} | {arm} | {options.seeds} | {means} | {gaps} |", flush=True)


if __name__ == "__main__":
    main()
