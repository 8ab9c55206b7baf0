"""Time and memory of one fine-tuning step: our segmenter beside segmentation_models_pytorch's, with the same encoder.

    OMP_NUM_THREADS=1 python tests/benchmarks/segment_speed.py [--rounds 5] [--side 128]

Each row is a process of its own, so that peaks of memory do not mix. A step is what training repeats: forward,
cross-entropy of every pixel, backward, AdamW. Times are the fastest of the rounds, after one that warms up. Memory is
the growth of the process's peak from before the first step.
"""

import argparse
import resource
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
    return Segmenter(load_backbone(f"timm:{name}", (side, side)), WIDTH, CLASSES, dropout=0.1)


def theirs(name: str, side: int) -> nn.Module:
    taken = f"tu-{name}" if name == RESNET else encoder(name, side)
    return smp.Segformer(taken, encoder_weights=None, decoder_segmentation_channels=WIDTH, classes=CLASSES)


MODELS = {"ours": ours, "smp": theirs}


def measure(kind: str, name: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MODELS[kind](name, options.side).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.randn(options.batch_size, 3, options.side, options.side)
    masks = torch.randint(0, CLASSES, (options.batch_size, options.side, options.side))
    before, best = _peak(), float("inf")
    for number in range(options.rounds + 1):
        begun = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(images), masks).backward()
        optimizer.step()
        if number:
            best = min(best, time.process_time() - begun)
    count = sum(each.numel() for each in model.parameters()) / 1e6
    label = "this package" if kind == "ours" else "segmentation_models_pytorch"
    return f"| {name} | {label} | {count:.1f} | {1000 * best / options.batch_size:.0f} | {_peak() - before:,.0f} |"


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
        for kind in MODELS:
            command = [sys.executable, *sys.argv, "--row", kind, name]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
