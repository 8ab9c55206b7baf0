"""Whether training waits for the views of its next epoch, and how much disk they take, by the number of views.

    python -m tests.benchmarks.views_ahead --data tiny20-train.tar --out runs/views-ahead

A student learns from random labels of V views: the top 5 and one draw of each of 14 × 14 tokens, in q8. Each cache
holds one view, so that the next one is made while each epoch trains. The row "all at once" is the same run with a cache
of all views, which is made before. The wait is what the log calls ``data_wait_seconds``: from the start of an epoch to
its first batch, and between batches. The first epoch is not counted, for the compilation in it. Disk is the most
that the token caches took at any time.

    python -m tests.benchmarks.views_ahead --data tiny20-train.tar --out runs/views-ahead --views 8 --reading

makes the caches alone, from the set as it is dumped and from the same set divided into parts of one view: bytes of
shards that each epoch reads, and the processor time that it takes to make the cache.
"""

import argparse
import json
import os
import shutil
import threading
import time
from pathlib import Path
from unittest import mock

import numpy as np

from stl_offline.config import StudentConfig
from stl_offline.geometry import CropSettings, draw_views
from stl_offline.images.beton import Beton
from stl_offline.images.pack import ensure_beton
from stl_offline.labels import views_ahead
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.cache import CacheMaker
from stl_offline.labels.convert import convert
from stl_offline.labels.label_set import LabelSet, open_label_set
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.views_ahead import ViewsAhead
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


def print_reading(labels: Path, out: Path, packed: Beton) -> None:
    """One row each of the set and of its division: what one epoch's cache reads and costs."""
    divided = out / f"{labels.name}-divided"
    convert(open_label_set(labels), divided, views_per_part=1)
    read, original = [0], LabelSet.read_bytes

    def count(label_set: LabelSet, index: int, **options) -> bytes:
        data = original(label_set, index, **options)
        read[0] += len(data)
        return data

    views_ahead.SPAN_BYTES = 1
    for name, place in (("as dumped", labels), ("a part for each view", divided)):
        label_set, cache = open_label_set(place), out / "reading"
        images = (packed.keys, packed.content_hashes, packed.class_names)
        policy = {"match": "key", "missing": "error", "allow_changed": False}
        with mock.patch.object(LabelSet, "read_bytes", count):
            sizes, seconds = [], []
            for epoch in range(label_set.spec.views_per_image):
                shutil.rmtree(cache, ignore_errors=True)
                ahead = ViewsAhead(CacheMaker(label_set.parts, *images, folder=cache, **policy))
                read[0], started = 0, time.process_time()
                ahead.of_epoch(epoch, epoch + 1)
                seconds.append(time.process_time() - started)
                sizes.append(read[0])
        size = sum(shard.bytes for shard in label_set.shards)
        cells = [f"{size / 1e6:.1f}", f"{np.mean(sizes) / 1e6:.1f}", f"{np.median(seconds):.2f}"]
        print(f"| {label_set.spec.views_per_image} | {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--views", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--model", default="fan_micro_4_p8")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--reading", action="store_true", help="make caches alone, and count what they read")
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    packed = ensure_beton(options.data)
    shutil.copyfile(packed.path, out / "images.beton")
    if options.reading:
        print("| views | label set | MB | MB read per epoch | processor seconds per epoch |\n|---|---|---|---|---|")
        for count in options.views:
            make_set(out / f"labels-{count}", packed, count)
            print_reading(out / f"labels-{count}", out, packed)
        return
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
