"""The targets of a student's tokens, from one label map seen through the student's view.

A map is a grid of top-k class probabilities; what they leave out of 1 is the residual. A student's token is the mean
of s×s bilinear sample points of the map (`stl_offline.targets.align`). Three kinds of target:

- ``gumbel``: one class, drawn from that mixture (STL, arXiv 2401.03844, section 3.2: hard Gumbel-softmax with
  temperature 1 is sampling the softmax). The mixture is never formed: drawing the sample point, then one of its four
  cells by the bilinear weights, then a class of that cell has the same distribution at constant cost.
- ``soft``: the m most probable classes of the mixture, with their probabilities.
- ``argmax``: the most probable class, weighted by the share of the token that lies on the map.

Gh, Gw: the map's grid; k: its stored classes; K: classes; h, w: the student's grid, N = h·w tokens; m: classes kept
by "soft"; T: targets per token. Ids that are no class: −1 spreads its weight evenly over all K classes, and with weight
0 is no target; −2 stands for all classes but those that the token's row lists before it (back to another −2, in a row
of mixed images), of whatever weight.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stl_offline.compiled import njit, read_only
from stl_offline.errors import InputError
from stl_offline.geometry import WHOLE_MAP, holds_map, is_identity, is_in_window
from stl_offline.random import STREAM_TOKEN, random_bits, unit_interval
from stl_offline.settings import EVEN, OUTSIDE, RESIDUALS, check_token_targets
from stl_offline.targets.align import check_map, neighbours, roi_align_topk_into


class Kind(NamedTuple):
    """How a kind of target is made.

    is_drawn: one class is drawn and the mixture is never formed; lists_classes: m classes of the mixture are given,
    not one.
    """

    is_drawn: bool
    lists_classes: bool


IGNORE, UNIFORM, CLASS, GHOST = range(len(RESIDUALS))

KINDS = {
    "gumbel": Kind(is_drawn=True, lists_classes=False),
    "soft": Kind(is_drawn=False, lists_classes=True),
    "argmax": Kind(is_drawn=False, lists_classes=False),
}


@dataclass(frozen=True)
class TokenTargets:
    """Which token targets a student gets.

    Args:
        kind: "gumbel", "soft" or "argmax".
        grid: the student's token grid (h, w).
        m: classes kept by "soft"; the other kinds give one.
        sampling_ratio: s, sample points along each side of a token.
        residual: what becomes of the mass r outside the known classes: "ignore" (no target), "uniform" (spread evenly
            over all classes), "class" (given to the image's own class), or "ghost" (one more outcome, "none of these":
            −r · log(1 − Σ p_student), summed over the known classes). These are the stored classes of the cell that
            "gumbel" draws from, and the m classes that "soft" lists; with "gumbel" the residual is drawn as often as
            its mass. "argmax" leaves nothing over.
        min_confidence: tokens whose nearest map cell has a lower confidence get no target.

    Raises:
        InputError: a value out of its range.
    """

    kind: str
    grid: tuple[int, int]
    m: int = 5
    sampling_ratio: int = 2
    residual: str = "ignore"
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise InputError(f"the token grid must be two positive integers, got {self.grid}")
        check_token_targets(self.kind, self.residual, self.m, self.sampling_ratio, self.min_confidence)
        if self.kind == "argmax" and self.residual != "ignore":
            raise InputError(f"`residual` does nothing for argmax targets, the best class alone; got {self.residual!r}")

    @property
    def tokens(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def is_drawn(self) -> bool:
        """Whether a class is drawn; otherwise the mixture is formed."""
        return KINDS[self.kind].is_drawn

    @property
    def best_only(self) -> bool:
        """Whether only the mixture's most probable class is given."""
        return not KINDS[self.kind].lists_classes

    @property
    def kept(self) -> int:
        """Classes of the mixture that are kept."""
        return 1 if self.best_only else self.m

    def targets_per_token(self, stored: int) -> int:
        """T, for maps of at most ``stored`` classes: m for "soft", and one more for a residual that has a target; 1 for
        the other kinds, but with "ghost" one drawn class, the stored ones, and −2."""
        if self.is_drawn and self.residual == "ghost":
            return stored + 2
        return self.kept + (not self.best_only and self.residual != "ignore")


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
    own_class: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One sample's token targets, as the loader makes them.

    Args:
        targets: which targets to give.
        class_ids, probabilities: (Gh, Gw, k); confidence: (Gh, Gw); the label map.
        relative_view: (2, 3), from the student's unit coordinates to the map's.
        num_classes: K.
        seed, epoch, sample_id: the draws are a pure function of these.
        own_class: the image's class, which ``residual`` "class" needs.

    Returns:
        ids (N, T) int32 and weights (N, T) float32. An id of −1 is no target, or spreads its weight evenly over all
        classes; −2 stands for all classes but those that the row lists before it.

    Raises:
        InputError: no class where one is needed, or shapes or class ids that do not fit.
    """
    check_map(class_ids, probabilities, relative_view)
    if class_ids.max() >= num_classes:
        raise InputError(f"class ids must be below num_classes, got {class_ids.max()} and {num_classes}")
    if confidence is None and targets.min_confidence == 0:  # draws alone have none, and nothing reads it
        confidence = np.ones(class_ids.shape[:2], np.float32)
    if np.shape(confidence) != class_ids.shape[:2]:
        raise InputError(f"confidence must be {class_ids.shape[:2]}, as the map, got {np.shape(confidence)}")
    if targets.residual == "class" and own_class is None:
        raise InputError('`residual="class"` needs the class of the image: give it as own_class')
    per_token = targets.targets_per_token(class_ids.shape[-1])
    ids = np.empty((targets.tokens, per_token), dtype=np.int32)
    weights = np.empty((targets.tokens, per_token), dtype=np.float32)
    residual = RESIDUALS.index(targets.residual)
    own = np.int64(-1 if own_class is None else own_class)
    class_ids = read_only(class_ids)
    probabilities = read_only(probabilities, np.float32)
    relative = np.array(relative_view, dtype=np.float64).ravel()
    out_ids = ids.reshape(*targets.grid, per_token)
    out_weights = weights.reshape(*targets.grid, per_token)
    if targets.is_drawn:
        draw_classes_into(
            class_ids,
            probabilities,
            relative,
            WHOLE_MAP,
            targets.sampling_ratio,
            residual,
            own,
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
            WHOLE_MAP,
            targets.sampling_ratio,
            residual,
            own,
            targets.best_only,
            AlignScratch.make(targets, num_classes),
            out_ids,
            out_weights,
        )
    if targets.min_confidence > 0:
        confidence = read_only(confidence, np.float32)
        drop_unsure(confidence, relative, np.float32(targets.min_confidence), out_ids, out_weights)
    return ids, weights


@njit
def draw_classes_into(
    class_ids,
    probabilities,
    relative,
    window,
    s,
    residual,
    own_class,
    num_classes,
    seed,
    epoch,
    sample_id,
    out_ids,
    out_weights,
):
    """`token_targets` of kind "gumbel" without checks or allocation, for compiled pipelines.

    relative: (6,) float64; window: four floats, what can be seen of the map; residual: its place in `RESIDUALS`;
    own_class: −1 for none; out_ids, out_weights: (h, w, T).
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
            for entry in range(out_ids.shape[2]):
                out_ids[row, column, entry] = EVEN
                out_weights[row, column, entry] = 0.0
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
                if residual == UNIFORM:
                    out_ids[row, column, 0] = int(unit_interval(b3) * num_classes)
                    out_weights[row, column, 0] = 1.0
                elif residual == CLASS and own_class >= 0:
                    out_ids[row, column, 0] = own_class
                    out_weights[row, column, 0] = 1.0
                elif residual == GHOST:
                    for entry in range(stored):
                        out_ids[row, column, 1 + entry] = class_ids[at_row, at_column, entry]
                    out_weights[row, column, out_ids.shape[2] - 1] = 1.0
            if residual == GHOST:  # whatever its weight: it also ends the list of a drawn class
                out_ids[row, column, out_ids.shape[2] - 1] = OUTSIDE


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


@njit
def align_classes_into(
    class_ids, probabilities, relative, window, s, residual, own_class, best_only, scratch, out_ids, out_weights
):
    """`token_targets` of the kinds "soft" and, with ``best_only``, "argmax", for compiled pipelines.

    relative: (6,) float64; window: four floats, what can be seen of the map; residual: its place in `RESIDUALS`;
    own_class: −1 for none; scratch: an `AlignScratch`; out_ids, out_weights: (h, w, T).
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
            if residual != IGNORE:
                out_ids[row, column, kept] = EVEN
                out_weights[row, column, kept] = max(covered - total, 0.0)
                if residual == GHOST:
                    out_ids[row, column, kept] = OUTSIDE
                elif residual == CLASS:
                    out_ids[row, column, kept] = own_class
                    if own_class < 0:
                        out_weights[row, column, kept] = 0.0


@njit
def drop_unsure(confidence, relative, min_confidence, out_ids, out_weights):
    """Remove the target of each token whose nearest cell of the map has a confidence below ``min_confidence``."""
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
