"""The images of docs/look.md, from a demo that has run: as WebP, a third of PNG's bytes. Needs Chromium.

    stl-offline demo --out runs/demo
    stl-offline labels preview runs/demo/labels --data runs/demo/images/train --samples 4 --scale-min 0.4 \\
        --out runs/look
    python -m tests.benchmarks.page_images --demo runs/demo --look runs/look --out docs
"""

import argparse
import tempfile
from pathlib import Path

from PIL import Image

from tests.reports.browser import Browser, find_chromium

WIDTH, HEIGHT = 1280, 900
QUALITY = 88


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, required=True, help="what the demo wrote")
    parser.add_argument("--look", type=Path, required=True, help="what labels preview wrote")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    command = find_chromium()
    if command is None:
        parser.error("no Chromium here; on Debian: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, Browser(command) as browser:
        seen = Path(folder) / "seen.png"
        reduce(options.look / "labels.png", options.out / "demo-labels.webp")
        browser.open(options.demo / "labels.html", WIDTH, HEIGHT)
        left, top, width, height = browser.box("article .probe")
        browser.point(left + 0.3 * width, top + 0.4 * height)
        browser.screenshot(seen)
        reduce(seen, options.out / "labels-page.webp")
        browser.point(1, 1)
        browser.open(options.demo / "report.html", WIDTH, HEIGHT, dark=True)
        browser.screenshot(seen)
        reduce(seen, options.out / "report-page.webp")


def reduce(source: Path, target: Path) -> None:
    """Write an image as WebP."""
    with Image.open(source) as image:
        image.convert("RGB").save(target, quality=QUALITY, method=6)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
