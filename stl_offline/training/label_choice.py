"""Which of several label sets each sample reads in an epoch: by its crop's zoom, or drawn in stated shares.

A labeler recognises objects at the scale of its training. Its labels of a crop of a quarter of the area, at its input
side, are closest to its labels of the whole image at twice that side. So of maps made at several sides,
the smallest fits whole images, and a crop of area a is fitted by the side nearest to smallest / √a.

n: samples; S: label sets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stl_offline.errors import InputError
from stl_offline.labels.label_set import LabelSet
from stl_offline.random import STREAM_LABELS, uniforms


class LabelChoice(Protocol):
    """Gives the number of the set that each sample reads in an epoch: int64 (n,)."""

    def __call__(self, epoch: int, crops_n6: np.ndarray, labelled_Sn: np.ndarray) -> np.ndarray:
        """crops_n6: each sample's view; labelled_Sn: bool. Of a sample that no set has, the first is named."""
        ...


@dataclass(frozen=True)
class ChooseByZoom:
    """sides: the labeler's input side for each set, in pixels."""

    sides: tuple[float, ...]

    def __call__(self, epoch: int, crops_n6: np.ndarray, labelled_Sn: np.ndarray) -> np.ndarray:
        area = np.abs(crops_n6[:, 0].astype(np.float64) * crops_n6[:, 4] - crops_n6[:, 1] * crops_n6[:, 3])
        fitting = np.log(min(self.sides)) - 0.5 * np.log(area)
        distance = np.abs(np.log(self.sides)[:, None] - fitting)
        return np.where(labelled_Sn, distance, np.inf).argmin(axis=0)


@dataclass(frozen=True)
class ChooseByDraw:
    """shares: how often each set is read, of samples that all sets have; seed: of the draw."""

    shares: tuple[float, ...]
    seed: int

    def __call__(self, epoch: int, crops_n6: np.ndarray, labelled_Sn: np.ndarray) -> np.ndarray:
        weights = np.array(self.shares)[:, None] * labelled_Sn
        ends = np.cumsum(weights, axis=0)
        drawn = uniforms(self.seed, STREAM_LABELS, epoch, np.arange(len(crops_n6)), 1)[:, 0] * ends[-1]
        return np.where(ends[-1] > 0, (drawn >= ends).sum(axis=0), 0)


def choose_between(
    label_sets: Sequence[LabelSet], pick: str, shares: Sequence[float] | None, seed: int
) -> LabelChoice | None:
    """The choice that settings ask for; None where there is one set.

    Args:
        pick: "zoom", "draw", or "auto": by zoom where all sets are of whole images, by the same labeler and at
            different sides, and no shares are given; else drawn.
        shares: of each set in the draw; None: equal ones.

    Raises:
        InputError: a choice by zoom between sets of crops, or of one side.
    """
    if len(label_sets) == 1:
        return None
    specs = [label_set.spec for label_set in label_sets]
    sides = tuple(math.sqrt(spec.preprocessing["height"] * spec.preprocessing["width"]) for spec in specs)
    crops = [label_set.place for label_set in label_sets if label_set.spec.views["kind"] != "whole"]
    if pick == "auto":
        labelers = {spec.labeler["weights_sha256"] for spec in specs}
        differ = len(set(sides)) == len(sides) and len(labelers) == 1
        pick = "zoom" if differ and not crops and shares is None else "draw"
    if pick == "draw":
        return ChooseByDraw(tuple(shares or [1.0] * len(specs)), seed)
    if crops:
        raise InputError(
            f'a choice by zoom needs maps of whole images, but {crops[0]} holds crops; use `labels_pick="draw"`'
        )
    if len(set(sides)) < len(sides):
        named = ", ".join(f"{each.place} {side:.0f} px" for each, side in zip(label_sets, sides, strict=True))
        raise InputError(
            f'a choice by zoom needs maps made at different input sides, got {named}; use `labels_pick="draw"`'
        )
    return ChooseByZoom(sides)
