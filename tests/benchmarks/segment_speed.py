"""Time and memory of one fine-tuning step: our segmenter beside segmentation_models_pytorch's, with the same encoder.

    OMP_NUM_THREADS=1 python tests/benchmarks/segment_speed.py [--rounds 5] [--side 128]

A step is what training repeats: forward, cross-entropy of every pixel, backward, AdamW. Each round is a process for
either side, in turns, so that peaks of memory do not mix. A round's time is that of the quicker of two steps, after one
that warms up. The table has medians over the rounds, and the times' range. Memory is the growth of the process's peak
from before the first step.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import nn

from stl_offline import PyramidEncoder, load_backbone
from stl_offline.transfer import Segmenter

WIDTH, CLASSES = 256, 11
HYBRID, RESNET = "fan_tiny_8_p4_hybrid", "resnet18"


def encoder(name: str, side: int) -> str:
    """The backbone registered as an encoder of segmentation_models_pytorch; gives back its name there."""
    make = partial(PyramidEncoder, load_backbone(f"timm:{name}", (side, side)))
    smp.encoders.encoders[name] = {"encoder": make, "params": {}, "pretrained_settings": {}}
    return name


def ours(name: str, side: int) -> nn.Module:
    return Segmenter(load_backbone(f"timm:{name}", (side, side)), WIDTH, CLASSES, dropout=0.0)


def theirs(name: str, side: int) -> nn.Module:
    taken = f"tu-{name}" if name == RESNET else encoder(name, side)
    return smp.Segformer(taken, encoder_weights=None, decoder_segmentation_channels=WIDTH, classes=CLASSES)


MODELS = {"ours": ours, "smp": theirs}


def measure(kind: str, name: str, options: argparse.Namespace) -> str:
    """Millions of parameters, CPU ms per image (of the quickest of two steps) and MB of memory, as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[kind](name, options.side).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(options.batch_size, 3, options.side, options.side)
    masks = torch.randint(0, CLASSES, (options.batch_size, options.side, options.side))
    before, best = _peak(), float("inf")
    for number in range(3):
        begun = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(images), masks).backward()
        optimizer.step()
        if number:
            best = min(best, time.process_time() - begun)
    count = sum(each.numel() for each in model.parameters()) / 1e6
    return json.dumps([count, 1000 * best / options.batch_size, _peak() - before])


def _peak() -> float:
    """The process's largest memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", type=int, default=128, help="of the crops, in pixels")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--backbones", nargs="+", default=[RESNET, HYBRID])
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(measure(*options.row, options))
        return
    print("| backbone | segmenter | parameters, millions | CPU ms per image | memory, MB |")
    print("|---|---|---:|---:|---:|")
    for name in options.backbones:
        found: dict[str, list[list[float]]] = {kind: [] for kind in MODELS}
        for number in range(options.rounds):
            for kind in list(MODELS)[:: -1 if number % 2 else 1]:
                command = [sys.executable, *sys.argv, "--row", kind, name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found[kind].append(json.loads(done.stdout))
        for kind, rows in found.items():
            count, times, memory = zip(*rows, strict=True)
            label = "this package" if kind == "ours" else "segmentation_models_pytorch"
            spread = f"{statistics.median(times):.0f} ({min(times):.0f} to {max(times):.0f})"
            print(f"| {name} | {label} | {count[0]:.1f} | {spread} | {statistics.median(memory):,.0f} |", flush=True)


if __name__ == "__main__":
    main()
