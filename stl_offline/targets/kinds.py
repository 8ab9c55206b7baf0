"""What a student's tokens should say, drawn from one label map seen through the student's view.

A map is a grid of top-k class probabilities; what they leave out of 1 is the residual. A student's token is the mean
of s×s bilinear sample points of the map (`stl_offline.targets.align`). Three kinds of target:

- ``gumbel``: one class, drawn from that mixture (STL, arXiv 2401.03844, section 3.2: hard Gumbel-softmax with
  temperature 1 is sampling the softmax). The mixture is never formed: drawing the sample point, then one of its four
  cells by the bilinear weights, then a class of that cell has the same distribution at constant cost.
- ``soft``: the m most probable classes of the mixture, with their probabilities.
- ``argmax``: the most probable class, weighted by the share of the token that lies on the map.

Gh, Gw: the map's grid; k: its stored classes; K: classes; h, w: the student's grid, N = h·w tokens; m: targets a
token. A target's id −1 with a weight above zero means that weight spread evenly over all K classes; −1 with weight 0
means nothing.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from stl_offline.errors import InputError
from stl_offline.geometry import WHOLE_MAP, holds_map, is_identity, is_in_window
from stl_offline.random import STREAM_TOKEN, random_bits, unit_interval
from stl_offline.targets.align import neighbours, roi_align_topk_into

KINDS = ("gumbel", "soft", "argmax")
RESIDUALS = ("ignore", "uniform")


@dataclass(frozen=True)
class TokenTargets:
    """Which token targets a student gets.

    kind: "gumbel", "soft" or "argmax"; grid: the student's (h, w); m: classes kept by "soft" (the others give one);
    sampling_ratio: s, sample points along each side of a token; residual: what becomes of mass outside the known
    classes, "ignore" (it asks for nothing) or "uniform" (spread evenly over all classes); min_confidence: tokens
    whose nearest map cell has a lower confidence get no target.
    """

    kind: str
    grid: tuple[int, int]
    m: int = 5
    sampling_ratio: int = 2
    residual: str = "ignore"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"token targets are one of {', '.join(KINDS)}; got {self.kind!r}")
        if self.residual not in RESIDUALS:
            raise InputError(f"the residual is one of {', '.join(RESIDUALS)}; got {self.residual!r}")
        if len(self.grid) != 2 or min(*self.grid, self.m, self.sampling_ratio) < 1:
            raise InputError(f"grid, m and sampling ratio must be positive, got {self}")
        if not 0 <= self.min_confidence <= 1:
            raise InputError(f"a confidence lies in [0, 1], got {self.min_confidence}")

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def kept(self) -> int:
        """Classes of the aligned mixture that are looked at."""
        return self.m if self.kind == "soft" else 1

    @property
    def columns(self) -> int:
        """Targets a token: m, and one more for the residual of "soft" where that is spread evenly."""
        if self.kind != "soft":
            return 1
        return self.m + (self.residual == "uniform")


def token_targets(
    targets: TokenTargets,
    class_ids: np.ndarray,
    probabilities: np.ndarray,
    confidence: np.ndarray,
    relative_view: np.ndarray,
    num_classes: int,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    window: tuple[float, float, float, float] = WHOLE_MAP,
) -> tuple[np.ndarray, np.ndarray]:
    """One sample's token targets, as the loader makes them.

    Args:
        targets: what to give.
        class_ids, probabilities: (Gh, Gw, k); confidence: (Gh, Gw); the label map.
        relative_view: (2, 3), from the student's unit coordinates to the map's.
        num_classes: K.
        seed, epoch, sample_id: what the draws depend on.
        window: (left, right, top, bottom) of what the student can see of the map, in the map's unit coordinates.

    Returns:
        ids (N, columns) int32 and weights (N, columns) float32.
    """
    ids = np.empty((targets.tokens, targets.columns), dtype=np.int32)
    weights = np.empty((targets.tokens, targets.columns), dtype=np.float32)
    # Writable arrays all have one type in compiled code, so that what is compiled here serves the loader, too.
    class_ids = np.require(class_ids, requirements="CW")
    probabilities = np.require(probabilities, np.float32, "CW")
    relative = np.array(relative_view, dtype=np.float64).ravel()
    window = tuple(float(edge) for edge in window)
    out_ids = ids.reshape(*targets.grid, targets.columns)
    out_weights = weights.reshape(*targets.grid, targets.columns)
    if targets.kind == "gumbel":
        draw_classes_into(
            class_ids,
            probabilities,
            relative,
            window,
            targets.sampling_ratio,
            targets.residual == "uniform",
            num_classes,
            np.uint64(seed % 2**64),
            np.uint64(epoch),
            np.uint64(sample_id),
            out_ids,
            out_weights,
        )
    else:
        align_classes_into(
            class_ids,
            probabilities,
            relative,
            window,
            targets.sampling_ratio,
            targets.residual == "uniform",
            targets.kind == "argmax",
            AlignScratch.make(targets, num_classes),
            out_ids,
            out_weights,
        )
    if targets.min_confidence > 0:
        confidence = np.require(confidence, np.float32, "CW")
        drop_unsure(confidence, relative, np.float32(targets.min_confidence), out_ids, out_weights)
    return ids, weights


@njit(cache=True, nogil=True)
def draw_classes_into(
    class_ids,
    probabilities,
    relative,
    window,
    s,
    uniform_residual,
    num_classes,
    seed,
    epoch,
    sample_id,
    out_ids,
    out_weights,
):
    """`token_targets` of kind "gumbel" without checks or allocation, for compiled pipelines.

    relative: (6,) float64; window: four floats, what can be seen of the map; out_ids, out_weights: (h, w, 1).
    """
    map_rows, map_columns, stored = class_ids.shape
    rows, columns = out_ids.shape[:2]
    same = (
        rows == map_rows
        and columns == map_columns
        and is_identity(relative[0], relative[1], relative[2], relative[3], relative[4], relative[5])
        and holds_map(window)
    )
    for row in range(rows):
        for column in range(columns):
            b0, b1, b2, b3 = random_bits(seed, STREAM_TOKEN, epoch, sample_id, row * columns + column)
            out_ids[row, column, 0] = -1
            out_weights[row, column, 0] = 0.0
            at_row = row
            at_column = column
            if not same:
                point = int(unit_interval(b0) * (s * s))
                v = (row + (point // s + 0.5) / s) / rows
                u = (column + (point % s + 0.5) / s) / columns
                x = relative[0] * u + relative[1] * v + relative[2]
                y = relative[3] * u + relative[4] * v + relative[5]
                if not is_in_window(x, y, window):
                    continue
                left, right, to_right = neighbours(x, map_columns)
                top, bottom, to_bottom = neighbours(y, map_rows)
                # One random number for both axes: what is left of it after the first choice is uniform again.
                rest = unit_interval(b1)
                if rest < to_bottom:
                    at_row = bottom
                    rest /= to_bottom
                else:
                    at_row = top
                    rest = (rest - to_bottom) / (1.0 - to_bottom)
                at_column = right if rest < to_right else left
            threshold = unit_interval(b2)
            total = 0.0
            for entry in range(stored):
                total += probabilities[at_row, at_column, entry]
                if threshold < total:
                    out_ids[row, column, 0] = class_ids[at_row, at_column, entry]
                    out_weights[row, column, 0] = 1.0
                    break
            else:
                if uniform_residual:
                    out_ids[row, column, 0] = int(unit_interval(b3) * num_classes)
                    out_weights[row, column, 0] = 1.0


class AlignScratch(NamedTuple):
    """Memory of `align_classes_into`.

    sums: (K,) float32, zeros on entry and on return; touched: (K,) int32; ids, probabilities: (h, w, kept) and covered:
    (h, w), any content.
    """

    sums: np.ndarray
    touched: np.ndarray
    ids: np.ndarray
    probabilities: np.ndarray
    covered: np.ndarray

    @classmethod
    def make(cls, targets: TokenTargets, num_classes: int) -> "AlignScratch":
        return cls(
            np.zeros(num_classes, dtype=np.float32),
            np.empty(num_classes, dtype=np.int32),
            np.empty((*targets.grid, targets.kept), dtype=np.int32),
            np.empty((*targets.grid, targets.kept), dtype=np.float32),
            np.empty(targets.grid, dtype=np.float32),
        )


@njit(cache=True, nogil=True)
def align_classes_into(
    class_ids, probabilities, relative, window, s, uniform_residual, best_only, scratch, out_ids, out_weights
):
    """`token_targets` of the kinds "soft" and, with ``best_only``, "argmax", for compiled pipelines.

    relative: (6,) float64; window: four floats, what can be seen of the map; scratch: an `AlignScratch`; out_ids,
    out_weights: (h, w, columns).
    """
    roi_align_topk_into(
        class_ids,
        probabilities,
        relative[0],
        relative[1],
        relative[2],
        relative[3],
        relative[4],
        relative[5],
        window,
        s,
        scratch.sums,
        scratch.touched,
        scratch.ids,
        scratch.probabilities,
        scratch.covered,
    )
    rows, columns, kept = scratch.ids.shape
    for row in range(rows):
        for column in range(columns):
            covered = scratch.covered[row, column]
            if best_only:
                best = scratch.ids[row, column, 0]
                out_ids[row, column, 0] = best
                out_weights[row, column, 0] = covered if best >= 0 else 0.0
                continue
            total = 0.0
            for entry in range(kept):
                out_ids[row, column, entry] = scratch.ids[row, column, entry]
                out_weights[row, column, entry] = scratch.probabilities[row, column, entry]
                total += scratch.probabilities[row, column, entry]
            if uniform_residual:
                out_ids[row, column, kept] = -1
                out_weights[row, column, kept] = max(covered - total, 0.0)


@njit(cache=True, nogil=True)
def drop_unsure(confidence, relative, min_confidence, out_ids, out_weights):
    """Take the target from each token whose nearest cell of the map is less confident than ``min_confidence``."""
    map_rows, map_columns = confidence.shape
    rows, columns = out_ids.shape[:2]
    for row in range(rows):
        v = (row + 0.5) / rows
        for column in range(columns):
            u = (column + 0.5) / columns
            x = relative[0] * u + relative[1] * v + relative[2]
            y = relative[3] * u + relative[4] * v + relative[5]
            at_column = min(max(int(x * map_columns), 0), map_columns - 1)
            at_row = min(max(int(y * map_rows), 0), map_rows - 1)
            if confidence[at_row, at_column] < min_confidence:
                for entry in range(out_ids.shape[2]):
                    out_ids[row, column, entry] = -1
                    out_weights[row, column, entry] = 0.0
