"""Do token labels help dense transfer? Pretrained runs, fine-tuned on masks or boxes with the same settings.

    python -m tests.benchmarks.transfer_study --masks camvid.tar --out runs/transfer \
        --pretrained 'none=runs/study/runs/none-seed*' 'online=runs/study/runs/online-seed*' \
        'draws=runs/study/runs/views-draws-seed*'
    python -m tests.benchmarks.transfer_study --boxes bccd.tar --out runs/transfer --pretrained …

``--pretrained ARM=GLOB`` names run folders that end in ``seedN``. The arm `random` has no pretraining. The backbone of
seed N is fine-tuned with seed N, so that differences are of paired seeds; their standard errors are over seeds.

Masks: images and masks are made half as large first (CamVid's: 240×180), so that one fine-tuning takes minutes on one
core; mIoU is measured at that size, on clean images and on eight kinds of ImageNet-C's corruptions at severity 3.
Boxes: mAP likewise. Scored images are not used during fine-tuning, not even to select weights. ``--test`` and
``--test-split`` score other images with the same fine-tuned runs. Interrupted runs are continued by the same command,
and complete ones are not repeated. ``--jobs`` processes run side by side, each with one computing thread; ``--device``
is where models are. One fine-tuning with its scores takes about 5 minutes on one core for CamVid and 6 for BCCD.
"""

import argparse
import glob
import io
import json
import math
import multiprocessing
import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from stl_offline.config_transfer import DetectConfig, SegmentConfig, TransferEvaluateConfig
from stl_offline.files import atomic_write, sha256_bytes
from stl_offline.transfer import evaluate_transfer, train_detector, train_segmenter
from stl_offline.transfer.pairs import find_pairs

MACHINE = {"workers": 1}
CAMVID = "sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
BCCD = "RBC,WBC,Platelets"
# Two of each category of ImageNet-C, at the middle severity: all 15 would take as long as fine-tuning.
CORRUPTIONS = (
    "gaussian_noise",
    "impulse_noise",
    "defocus_blur",
    "motion_blur",
    "snow",
    "fog",
    "contrast",
    "jpeg_compression",
)
# What differs between masks and boxes: classes, epochs, images per step, rate of the backbone, channels of the head.
DEFAULTS = {
    "masks": {"classes": CAMVID, "epochs": 18, "batch_size": 8, "lr": 3e-4, "head_width": 128},
    "boxes": {"classes": BCCD, "epochs": 4, "batch_size": 4, "lr": 3e-4, "head_width": 64},
}
SCORES = ("clean", "corrupted", "retention")


def pretrained_runs(given: list[str], seeds: int) -> dict[str, list[str]]:
    """Arms and their backbones by seed, from ``ARM=GLOB``; ends the program where a seed has not one complete run."""
    arms: dict[str, list[str]] = {}
    for each in given:
        arm, _, pattern = each.partition("=")
        found: dict[int, list[str]] = {}
        for folder in glob.glob(pattern):
            if number := re.search(r"seed(\d+)/?$", folder):
                found.setdefault(int(number[1]), []).append(folder)
        wrong = [seed for seed in range(seeds) if len(found.get(seed, ())) != 1]
        if wrong:
            raise SystemExit(f"{each}: no run or several for the seeds {wrong}; folders must end in seed0, seed1, …")
        arms[arm] = [found[seed][0] for seed in range(seeds)]
        # The weights of a run that still trains change.
        training = [folder for folder in arms[arm] if not Path(folder, "summary.json").is_file()]
        if training:
            raise SystemExit(f"{each}: not complete, without summary.json: {', '.join(training)}")
    return arms


def mark(source: str) -> str:
    """A name for a source, which two of the same base name do not share."""
    return f"{Path(source).name}-{sha256_bytes(str(Path(source).absolute()).encode())[:8]}"


def half_size(source: str, split: str, out: Path) -> str:
    """A folder with the images and masks of a split at half their size, made once."""
    folder = out / f"{mark(source)}-half"
    done = folder / f"{split}.complete"
    if not done.is_file():
        for pair in find_pairs(source, split):
            name = pair.key.replace("/", "-")
            for kind, data, method in (
                ("images", pair.image(), Image.Resampling.BOX),
                ("masks", pair.mask(), Image.Resampling.NEAREST),
            ):
                place = folder / split / kind / f"{name}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                with Image.open(io.BytesIO(data)) as image:
                    image.resize((image.width // 2, image.height // 2), method).save(place)
        done.touch()
    return str(folder)


def make_halves(options: argparse.Namespace) -> None:
    """The images and masks of both splits at half their size."""
    half_size(options.masks, options.split, options.out)
    half_size(options.test or options.masks, options.test_split, options.out)


def fine_tune(backbone: str, seed: int, run: Path, options: argparse.Namespace) -> None:
    """Train a segmenter or detector, or continue one."""
    shared = MACHINE | {
        "device": options.device,
        "amp": options.amp,
        "split": options.split,
        "classes": options.classes,
        "backbone": backbone,
        "freeze": options.freeze,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "head_width": options.head_width,
        "drop_path": 0.0,
        "seed": seed,
        "tensorboard": False,
        "out": str(run),
    }
    if options.masks:
        data = half_size(options.masks, options.split, options.out)
        crop = {"crop_height": options.crop, "crop_width": options.crop, "ignore_id": options.ignore_id}
        train_segmenter(SegmentConfig(**shared, **crop, data=data, head_lr_scale=options.head_lr_scale))
    else:
        sides = {"side": options.side, "longest": 2 * options.side}
        train_detector(DetectConfig(**shared, **sides, data=options.boxes))


def measure(run: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All scores of a fine-tuned run on the test images, measured once."""
    source = options.test or options.masks or options.boxes
    settings = sha256_bytes(f"{options.corrupt} {options.test_split}".encode())[:8]
    stored = run / f"scores-{mark(source)}-{settings}.json"
    if not stored.is_file():
        data = half_size(source, options.test_split, options.out) if options.masks else source
        config = TransferEvaluateConfig(
            data=data,
            split=options.test_split,
            checkpoint=str(run),
            corrupt=options.corrupt,
            device=options.device,
            amp=options.amp,
            **MACHINE,
        )
        atomic_write(stored, json.dumps(evaluate_transfer(config), indent=1).encode())
    return json.loads(stored.read_text())


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    kind, score = ("masks", "miou") if options.masks else ("boxes", "map")
    arms = {"random": [f"timm:{options.model}"] * options.seeds} | pretrained_runs(options.pretrained, options.seeds)
    if options.masks:
        make_halves(options)  # before several processes want them
    values: dict[str, dict[str, list[float]]] = {arm: {each: [] for each in SCORES} for arm in arms}
    # One seed of all arms first: a study cut short still compares them.
    each_run = [(arm, backbones[seed], seed) for seed in range(options.seeds) for arm, backbones in arms.items()]
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        for (arm, _, seed), found in zip(each_run, pool.map(partial(_in_worker, options), each_run), strict=True):
            retention = math.nan if found["retention"] is None else found["retention"]  # where nothing was found
            row = (found[score], found[f"corrupted_{score}"], retention)
            for name, value in zip(SCORES, row, strict=True):
                values[arm][name].append(value)
            shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in zip(SCORES, row, strict=True))
            print(f"{kind} {arm} seed {seed}: {shown}; {found['cpu_seconds']:,.0f} s of CPU", flush=True)
    print("\n".join(table(values, score, options.base)))


def _in_worker(options: argparse.Namespace, each: tuple[str, str, int]) -> dict[str, Any]:
    try:
        return score_of_run(options, each)
    except KeyboardInterrupt:
        os._exit(130)  # else this worker would begin what is queued


def score_of_run(options: argparse.Namespace, each: tuple[str, str, int]) -> dict[str, Any]:
    """Fine-tune and score (arm, backbone, seed); gives the scores, and the processor's time that this call took."""
    arm, backbone, seed = each
    begun = time.process_time()
    kind = "masks" if options.masks else "boxes"
    run = options.out / kind / f"{arm}{'-frozen' if options.freeze else ''}-seed{seed}"
    fine_tune(backbone, seed, run, options)
    return measure(run, options) | {"cpu_seconds": time.process_time() - begun}


def table(values: dict[str, dict[str, list[float]]], score: str, base: str) -> list[str]:
    """Markdown: means over seeds, and differences from the arm ``base`` in points with their standard errors."""
    name = {"miou": "mIoU", "map": "mAP"}[score]
    heads = [f"{name} clean %", f"{name} corrupted %", "retention %"]
    rows = [["start", "seeds", *heads, *(f"{each[:-2]} − {base}" for each in heads)]]
    rows.append(["---"] * len(rows[0]))
    for arm, columns in values.items():
        means = [f"{100 * np.mean(column):.1f}" for column in columns.values()]
        gaps = [
            "" if arm == base or base not in values else difference(columns[key], values[base][key]) for key in SCORES
        ]
        rows.append([arm, str(len(columns["clean"])), *means, *gaps])
    return [f"| {' | '.join(row)} |" for row in rows]


def difference(ours: list[float], base: list[float]) -> str:
    """Mean difference of paired seeds, in points, and its standard error."""
    points = 100 * (np.array(ours) - np.array(base))
    error = "–" if len(points) < 2 else f"{points.std(ddof=1) / np.sqrt(len(points)):.1f}"
    return f"{points.mean():+.1f} (SE {error})"


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The options of a command line: ``words``, or the program's own."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument("--masks", help="images with masks")
    data.add_argument("--boxes", help="images with Pascal VOC boxes")
    parser.add_argument("--split", default="train", help="folder of the images to fine-tune on")
    parser.add_argument("--test", help="images to score (default: the same source)")
    parser.add_argument("--test-split", default="val", help="folder of the images to score")
    parser.add_argument("--classes", help="default: CamVid's, or BCCD's")
    parser.add_argument("--ignore-id", type=int, default=11)
    parser.add_argument("--pretrained", nargs="*", default=[], metavar="ARM=GLOB")
    parser.add_argument("--base", default="none", help="arm that the others are compared with")
    parser.add_argument("--model", default="fan_micro_4_p8", help="model of the arm that starts from random weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="fine-tunings side by side")
    parser.add_argument("--device", default="cpu", help="of the models")
    parser.add_argument("--amp", default="none", help="mixed precision: none, bf16, fp16 or auto")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--head-width", type=int)
    parser.add_argument("--head-lr-scale", type=float, default=10.0, help="for masks")
    parser.add_argument("--crop", type=int, default=128, help="side of the training crops, for masks")
    parser.add_argument("--side", type=int, default=160, help="shorter side of the images, for boxes")
    parser.add_argument("--freeze", action="store_true", help="train the head alone")
    parser.add_argument("--corrupt", default=",".join(f"{name}:3" for name in CORRUPTIONS))
    options = parser.parse_args(words)
    for name, value in DEFAULTS["masks" if options.masks else "boxes"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()
