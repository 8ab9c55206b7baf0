"""Whether training waits for the views of its next epoch, and how much disk they take, by the number of views.

    python -m tests.benchmarks.views_ahead --data tiny20-train.tar --out runs/views-ahead

A student learns from random labels of V views: the top 5 and one draw of each of 14 × 14 tokens, in q8. Each cache
holds one view, so that the next one is made while each epoch trains. The row "all at once" is the same run with a cache
of all views, which is made before. The wait is what the log calls ``data_wait_seconds``: from the start of an epoch to
its first batch, and between batches. The first epoch is not counted, for the compilation in it. Disk is the most
that the token caches took at any time.
"""

import argparse
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np

from stl_offline.config import StudentConfig
from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import ensure_beton
from stl_offline.labels import views_ahead
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.training.train_student import train_student

GRID, TOP_K, SHARDS, EPOCHS = (14, 14), 5, 8, 4


def make_set(path: Path, beton: Beton, count: int) -> None:
    """Random labels of ``count`` random crops of each image."""
    views = {"kind": "random", "seed": 0, "scale": [0.25, 1.0], "ratio": [0.75, 4 / 3], "flip": 0.5}
    spec = LabelSpec(
        class_names=beton.class_names,
        grid=GRID,
        top_k=TOP_K,
        draws=1,
        views_per_image=count,
        labeler={"architecture": "random", "weights_sha256": "0" * 64, "licence": "none"},
        preprocessing={"height": 64, "width": 64, "interpolation": "area"}
        | {"mean": [0.5] * 3, "std": [0.25] * 3, "decoder": "stl-offline"},
        source={"samples": len(beton), "fingerprint": beton.fingerprint},
        views=views,
        encoding="q8",
    )
    crops = CropSettings(scale=(0.25, 1.0))
    with LabelSetWriter(path, spec, SHARDS) as writer:
        for index in writer.todo():
            samples = np.arange(*writer.shard_range(index))
            sizes = beton.heights[samples], beton.widths[samples]
            draw = np.random.default_rng(index)
            shape = (len(samples), count, *GRID)
            ranked = draw.random((*shape, len(beton.class_names))).argsort(axis=-1).astype(spec.id_dtype)
            logits = -np.sort(draw.gamma(1.0, 2.0, (*shape, TOP_K))).astype(np.float32)
            own = np.exp(logits - logits[..., :1]).sum(axis=-1)
            writer.write_shard(
                index,
                ShardArrays(
                    keys=[beton.keys[sample] for sample in samples],
                    content_hash=np.asarray(beton.content_hashes[samples]),
                    class_id=np.asarray(beton.class_ids[samples], dtype=np.uint32),
                    views=np.stack([draw_views(0, view, samples, *sizes, crops) for view in range(count)], axis=1),
                    class_ids=ranked[..., :TOP_K],
                    logits=logits,
                    confidence=(0.9 / own).astype(np.float32),
                    draws=ranked[..., TOP_K : TOP_K + 1],
                ),
            )
        writer.finish()


class MostDisk:
    """``with MostDisk(folder) as disk: …`` then ``disk.bytes``: the most that its files took."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.bytes, self._over = folder, 0, threading.Event()

    def __enter__(self) -> "MostDisk":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            found = 0
            for root, _, names in os.walk(self._folder):
                for name in names:
                    try:
                        found += os.stat(os.path.join(root, name)).st_blocks * 512
                    except FileNotFoundError:
                        continue
            self.bytes = max(self.bytes, found)


def run(labels: Path, out: Path, options: argparse.Namespace) -> str:
    """One training run: cells of the table."""
    cache = out / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    os.environ["STL_OFFLINE_CACHE"], before = str(cache), os.environ.get("STL_OFFLINE_CACHE")
    config = StudentConfig(
        data=str(out / "images.beton"),
        labels=str(labels),
        out=str(out / "run"),
        resume=False,
        model=options.model,
        img_size=64,
        epochs=EPOCHS,
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
    )
    with MostDisk(cache / "tokens") as disk:
        train_student(config)
    if before is not None:
        os.environ["STL_OFFLINE_CACHE"] = before
    epochs = [json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines()][1:]
    seconds = sum(each["seconds"] for each in epochs) / len(epochs)
    waits = [each["data_wait_seconds"] / each["seconds"] for each in epochs]
    rate = np.mean([each["images_per_second"] for each in epochs])
    return f"{seconds:.1f} | {rate:,.0f} | {np.mean(waits):.2%} (at most {max(waits):.2%}) | {disk.bytes / 1e6:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--views", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--model", default="fan_micro_4_p8")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    packed = ensure_beton(options.data)
    shutil.copyfile(packed.path, out / "images.beton")
    print("| views | cache | seconds per epoch | images/s | waiting for data | disk, MB | made in the background, s |")
    print("|---|---|---|---|---|---|---|")
    made: list[float] = []
    make = views_ahead._Making.run

    def timed(making) -> None:
        started = time.perf_counter()
        make(making)
        made.append(time.perf_counter() - started)

    views_ahead._Making.run = timed
    for count in options.views:
        labels = out / f"labels-{count}"
        make_set(labels, packed, count)
        for name, span in (("all at once", 1 << 62), ("one view", 1)):
            views_ahead.SPAN_BYTES = span
            made.clear()
            cells = run(labels, out, options)
            last = f"{np.mean(made):.1f}" if made else ""
            print(f"| {count} | {name} | {cells} | {last} |", flush=True)


if __name__ == "__main__":
    main()
