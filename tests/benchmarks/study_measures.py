"""How well dumped labels agree with online ones on the same crops, and where a labeler's confidence falls.

B: batch, N: tokens, K: classes, m: classes listed for a token.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from stl_offline.config import StudentConfig
from stl_offline.labels.label_set import open_label_set
from stl_offline.models import create_labeler
from stl_offline.training.label_sources import open_labels
from stl_offline.training.setup import make_train_loader, prepare

IMAGES = 1000
CONFIDENT = 0.5
FLOOR = 1e-4  # of a dumped probability, so that the divergence stays finite


@torch.inference_mode()
def measure_agreement(student: StudentConfig, online: StudentConfig) -> dict:
    """Targets as ``student`` gets them against the labeler of ``online`` on the very pixels, over all tokens.

    top1: share of tokens whose best class is the same; kl: KL(online ‖ dumped) in nats, mass beyond the stored classes
    spread evenly; small: both again on crops of less than half the area.
    """
    stage = prepare(student, "student")
    source = open_labels(student, stage)
    labeler = create_labeler(online.labeler).eval()
    loader = make_train_loader(stage, source.loader_labels())
    chosen = np.unique(np.linspace(0, len(stage.train) - 1, IMAGES).round().astype(np.int64))
    rows = []
    for batch in loader.epoch(0, sample_ids=chosen, **source.plan(0)):
        p_BNK = labeler(batch.images)[1].float().softmax(dim=-1)
        q_BNK = _dense(batch.token_ids, batch.token_weights, p_BNK.shape[-1])
        same = (p_BNK.argmax(dim=-1) == q_BNK.argmax(dim=-1)).float().mean(dim=1)
        q_BNK = q_BNK.clamp(min=FLOOR)
        q_BNK = q_BNK / q_BNK.sum(dim=-1, keepdim=True)
        kl = (p_BNK * (p_BNK.clamp(min=1e-12).log() - q_BNK.log())).sum(dim=-1).mean(dim=1)
        areas = (batch.views[:, 0] * batch.views[:, 4]).abs()
        rows.append(torch.stack([same, kl, areas], dim=1).numpy())
    same, kl, areas = np.concatenate(rows).T.astype(np.float64)
    small = areas < 0.5
    return {
        "top1": same.mean(),
        "kl": kl.mean(),
        "small": {"top1": same[small].mean(), "kl": kl[small].mean()} if small.any() else None,
        "images": len(same),
    }


def _dense(ids_BNm: Tensor, weights_BNm: Tensor, classes: int) -> Tensor:
    spread = ids_BNm < 0
    dense = torch.zeros(*ids_BNm.shape[:2], classes)
    dense.scatter_add_(2, ids_BNm.clamp(min=0), weights_BNm.masked_fill(spread, 0.0))
    return dense + (weights_BNm * spread).sum(dim=-1, keepdim=True) / classes


def measure_boxes(label_set: Path, boxes: str, side: int) -> dict:
    """Share of tokens confident of the image's own class inside and outside its object's box.

    A token is inside by the share of its cell that the box covers.
    """
    opened = open_label_set(label_set)
    stored = json.loads(Path(boxes).read_text())["boxes_xyxy_in_64px"]
    by_key = {name.rpartition(".")[0]: box for name, box in stored.items()} | stored
    confident, tokens = np.zeros(2), np.zeros(2)
    for shard in range(len(opened.shards)):
        arrays = opened.read_shard(shard)
        own = arrays.class_ids[:, 0, :, :, 0] == arrays.class_id[:, None, None]
        sure = own & (arrays.confidence[:, 0] >= CONFIDENT)
        inside = np.stack([_cells_inside(by_key[key], side, opened.spec.grid) for key in arrays.keys])
        for part, weight in enumerate((inside, 1 - inside)):
            confident[part] += (sure * weight).sum()
            tokens[part] += weight.sum()
    shares = confident / tokens
    return {"inside": shares[0], "outside": shares[1], "box_share": tokens[0] / tokens.sum()}


def _cells_inside(box: list[int], side: int, grid: tuple[int, int]) -> np.ndarray:
    """Share of each cell that a box (left, top, right, bottom; its last pixels included) covers."""
    left, top, right, bottom = box
    mask = np.zeros((side, side))
    mask[top : bottom + 1, left : right + 1] = 1
    return mask.reshape(grid[0], side // grid[0], grid[1], side // grid[1]).mean(axis=(1, 3))
