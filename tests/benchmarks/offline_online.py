"""A student's step with dumped labels and with the labeler run in the step, and the ratio that arithmetic allows.

    python tests/benchmarks/offline_online.py [--pair small] [--batch-size 16] [--rounds 5]

Both are the commands' own runs: loader, label cache, engine, optimiser. Images are noise of a photograph's size and
weights are random, which changes none of the work. Runs of two epochs alternate; the second epoch counts, and the table
gives medians of the rounds. The arithmetic is what torch's FlopCounterMode counts: (3 × student forward + labeler
forward) / (3 × student forward).
"""

import argparse
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from stl_offline.config import DumpConfig, StudentConfig
from stl_offline.dump import dump_labels
from stl_offline.images.beton import BetonWriter
from stl_offline.images.encode import encode_image
from stl_offline.models import WEIGHTS_NAME, ModelDescription, resolve_model, save_model
from stl_offline.training.train_student import train_student

# name → student, labeler, pixels, classes
PAIRS = {
    "micro": ("fan_micro_4_p8", "fan_micro_4_p8", 64, 20),
    "small": ("fan_tiny_8_p4_hybrid", "fan_small_12_p4_hybrid", 224, 1000),
}


def write_images(path: Path, count: int, classes: int) -> None:
    """A .beton of noisy images of 400 × 500 pixels."""
    draw = np.random.default_rng(0)
    with open(path, "wb") as stream:
        writer = BetonWriter(stream, count)
        for number in range(count):
            coarse = Image.fromarray(draw.integers(0, 256, (25, 20, 3), dtype=np.uint8)).resize((400, 500))
            encoded = io.BytesIO()
            coarse.save(encoded, "JPEG", quality=90)
            writer.add(f"image {number:05d}", number % classes, encode_image(encoded.getvalue()))
        writer.finish([f"class {index:04d}" for index in range(classes)], {"kind": "benchmark"})


def write_labeler(folder: Path, name: str, side: int, classes: int) -> None:
    """A run's folder with a labeler of random weights."""
    folder.mkdir()
    name, _ = resolve_model(name)
    model = timm.create_model(name, num_classes=classes, img_size=side)
    names = tuple(f"class {index:04d}" for index in range(classes))
    save_model(folder / WEIGHTS_NAME, model.state_dict(), ModelDescription(name, names, side, "labeler"))


def step_seconds(out: Path, **settings) -> np.ndarray:
    """Seconds of the clock and of the processor for one step of a run's second epoch, loading included."""
    train_student(StudentConfig(out=str(out), epochs=2, resume=False, warmup_epochs=0, **settings))
    first, second = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    return np.array([second["seconds"], second["cpu_seconds"]]) / (second["step"] - first["step"])


def allowed_ratio(student: str, labeler: str, side: int, classes: int) -> float:
    """What the labeler's forward pass adds to a student's step, by arithmetic: each product in forward is two in
    backward."""
    counts = []
    for name in (student, labeler):
        model = timm.create_model(resolve_model(name)[0], num_classes=classes, img_size=side)
        model.eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, 3, side, side))
        counts.append(counter.get_total_flops())
    return (3 * counts[0] + counts[1]) / (3 * counts[0])


def compare(name: str, options: argparse.Namespace, folder: Path) -> str:
    """A row of the table."""
    student, labeler, side, classes = PAIRS[name]
    images = folder / "images.beton"
    write_images(images, options.batch_size * options.steps, classes)
    write_labeler(folder / "labeler", labeler, side, classes)
    machine = {"device": "cpu", "workers": options.workers}
    labels = str(folder / "labels")
    dump_labels(DumpConfig(data=str(images), labeler=str(folder / "labeler"), out=labels, shards=1, **machine))
    shared = {"data": str(images), "model": student, "img_size": side, "batch_size": options.batch_size, **machine}
    ways = {"offline": {"labels": labels}, "online": {"labels": "online", "labeler": str(folder / "labeler")}}
    # Rounds × ways × (clock, processor).
    seconds = np.array(
        [[step_seconds(folder / way, **shared, **ways[way]) for way in ways] for _ in range(options.rounds)]
    )
    milliseconds = 1000 * np.median(seconds[:, :, 0], axis=0)
    ratios = np.median(seconds[:, 1] / seconds[:, 0], axis=0)
    allowed = allowed_ratio(student, labeler, side, classes)
    return (
        f"| {student} by {labeler}, {side} px | {options.batch_size} | {milliseconds[0]:,.0f} "
        f"| {milliseconds[1]:,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {allowed:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pair", choices=PAIRS, default="micro")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = compare(options.pair, options, Path(folder))
    print("| student by labeler | batch | ms per step, dumped | ms per step, online | ratio | by processor | allowed |")
    print("|---|---|---|---|---|---|---|")
    print(row)


if __name__ == "__main__":
    main()
