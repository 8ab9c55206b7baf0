"""How fast corruptions are generated: images per second of CPU time on one core, by kind, at severities 1, 3 and 5.

python tests/benchmarks/corruption_speed.py --data in1k-512.tar
"""

import argparse
import io
import time

import cv2
import numpy as np
from PIL import Image

from stl_offline.evaluation import corrupt, parse_corruptions
from stl_offline.evaluation.images import Transform
from stl_offline.images.sources import open_source

SEVERITIES = (1, 3, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.0, help="at least, per kind and severity")
    options = parser.parse_args()
    cv2.setNumThreads(1)
    transform = Transform((options.side, options.side), 0.875, "bicubic")
    source = list(open_source(options.data))
    chosen = np.linspace(0, len(source) - 1, options.images).astype(int)
    images = [transform(Image.open(io.BytesIO(source[index].data)).convert("RGB")) for index in chosen]
    print("| kind | " + " | ".join(f"severity {severity}" for severity in SEVERITIES) + " |")
    print("|---" * (1 + len(SEVERITIES)) + "|")
    for kind in dict.fromkeys(kind for kind, _ in parse_corruptions("all")):
        corrupt(images[0], kind, 1, seed=0, key="")  # compiles, and reads files
        rates = [_rate(images, kind, severity, options.seconds) for severity in SEVERITIES]
        print(f"| {kind.replace('_', ' ')} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |", flush=True)


def _rate(images: list[np.ndarray], kind: str, severity: int, seconds: float) -> float:
    count, started = 0, time.process_time()
    while (spent := time.process_time() - started) < seconds:
        corrupt(images[count % len(images)], kind, severity, seed=0, key=str(count))
        count += 1
    return count / spent


if __name__ == "__main__":
    main()
