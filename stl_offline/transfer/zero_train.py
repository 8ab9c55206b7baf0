"""``stl-offline transfer zero-train``: a token head as a coarse segmenter that has never seen a mask.

For each image, the tokens' log-odds of the image's class are resized to its mask; they are foreground where they reach
those of a threshold. What this scores was learned from class labels alone: it is how well objects emerge in the tokens.

B: batch; N = Gh·Gw: tokens; K: classes; H, W: mask.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stl_offline.config_transfer import ZeroTrainConfig
from stl_offline.device import autocast, pick_amp, pick_device, pick_workers
from stl_offline.errors import InputError
from stl_offline.evaluation import match_classes, scoring_loader
from stl_offline.geometry import View, whole_views
from stl_offline.images.beton import Beton
from stl_offline.images.masks import BOX_SIDE, read_masks
from stl_offline.images.pack import ensure_beton
from stl_offline.labels.foreground import auroc, coverage
from stl_offline.models import load_model
from stl_offline.progress import progress_bar
from stl_offline.transfer.segment_scores import SegmentScores

_NAMES = ("background", "foreground")


@torch.inference_mode()
def score_token_head(config: ZeroTrainConfig) -> dict[str, Any]:
    """Compare the token head's foreground with masks or boxes.

    Returns:
        The scores of `SegmentScores` for background and foreground; ``auroc`` of a token's log-odds as a test of being
        in the object, mean over images; ``all_foreground``: the foreground's IoU if every pixel were predicted so;
        ``samples`` with a mask, ``images`` in all.

    Raises:
        InputError: no such run, a token head that was not trained, or no image has a mask.
        JoinError: the images have classes that the model does not have.
    """
    device = pick_device(config.device)
    model, description = load_model(config.checkpoint)
    if not description.has_trained_tokens:
        raise InputError(
            f"the token head of {config.checkpoint} was not trained; give a labeler or a student of labels"
        )
    side = config.img_size or description.img_size
    grid = model.grid_size(side, side)
    if not Path(config.masks).exists():  # before images are packed; boxes in pixels need their sizes
        raise InputError(f"there are no masks at {config.masks}")
    beton = ensure_beton(config.data, skip_broken=config.skip_broken)
    sizes = zip(beton.widths.tolist(), beton.heights.tolist(), strict=True)
    masks = read_masks(config.masks, dict(zip(beton.keys, sizes, strict=True)))
    class_map = torch.from_numpy(match_classes(beton, description.class_names, config.checkpoint))
    loader = scoring_loader(
        model.to(device).eval(),
        description,
        beton,
        device=device,
        batch_size=config.batch_size,
        workers=pick_workers(config.workers),
        side=side,
    )
    amp, level = pick_amp(config.amp, device), math.log(config.threshold / (1 - config.threshold))
    counts, areas, samples = np.zeros((2, 2)), [], 0
    with progress_bar(len(beton), "measuring") as bar:
        for batch in loader.epoch(0, whole_views(len(beton))):
            with autocast(device, amp):
                token_logits = model(batch.images)[1]
            classes = class_map[batch.class_ids.cpu()].to(device)
            odds = log_odds(token_logits.float(), classes).unflatten(1, grid).cpu()
            for number, sample in enumerate(batch.sample_ids.tolist()):
                mask = masks.get(beton.keys[sample])
                if mask is None:
                    continue
                _check_shape(mask, beton, sample)
                samples += 1
                predicted = resize(odds[number], mask.shape).numpy() >= level
                counts += np.bincount(2 * mask.ravel() + predicted.ravel(), minlength=4).reshape(2, 2)
                inside, outside = coverage(mask, View.identity(), grid)
                if inside.sum() > 0 and outside.sum() > 0:
                    areas.append(auroc(odds[number].numpy().ravel(), inside.ravel(), outside.ravel()))
            bar.update(len(batch))
    if not samples:
        raise InputError(
            f"none of the {len(beton):,} images has a mask; keys look like {beton.keys[0]!r}, "
            f"masks like {next(iter(masks), '')!r}"
        )
    scores = SegmentScores.of(counts).by_name(_NAMES)
    return {
        "images": len(beton),
        "samples": samples,
        **scores,
        "auroc": float(np.mean(areas)) if areas else None,
        "all_foreground": float(counts[1].sum() / counts.sum()),
    }


def _check_shape(mask: np.ndarray, beton: Beton, sample: int) -> None:
    """Raise InputError where a mask is not its image's, at whatever scale: of another shape, beyond rounding. Boxes are
    drawn into squares, whatever the shape."""
    height, width = int(beton.heights[sample]), int(beton.widths[sample])
    scale = mask.shape[0] / height
    if mask.shape != (BOX_SIDE, BOX_SIDE) and abs(mask.shape[1] - scale * width) > 1 + scale:
        raise InputError(
            f"the mask of {beton.keys[sample]} has {mask.shape[1]} × {mask.shape[0]} pixels, its image {width} × "
            f"{height}; give the masks of these images"
        )


def log_odds(token_logits_BNK: Tensor, classes_B: Tensor) -> Tensor:
    """log p / (1 − p) of one class per image at every token: (B, N)."""
    own = F.one_hot(classes_B, token_logits_BNK.shape[-1]).bool()[:, None]
    others = token_logits_BNK.masked_fill(own, -torch.inf).logsumexp(dim=-1)
    return token_logits_BNK.masked_fill(~own, 0).sum(dim=-1) - others


def resize(map_GhGw: Tensor, size: tuple[int, ...]) -> Tensor:
    """A token map at a mask's size (H, W): bilinear between the cells' centres."""
    return F.interpolate(map_GhGw[None, None], size=size[:2], mode="bilinear")[0, 0]
