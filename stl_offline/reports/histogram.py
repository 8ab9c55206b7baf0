"""How sure a labeler was: the confidence of its tokens, counted in bins."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from stl_offline.labels.arrays import ShardArrays
from stl_offline.reports.colors import CONFIDENT, UNCONFIDENT
from stl_offline.reports.png import save_figure

BINS = 20


@dataclass(eq=False)
class ConfidenceCounts:
    """Tokens by confidence, over the shards that were read.

    own, others: (BINS,) tokens that say their image's class, and the rest; images, shards: how many were counted.
    """

    own: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    others: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    images: int = 0
    shards: int = 0

    def add(self, arrays: ShardArrays) -> None:
        """Count a shard."""
        own = arrays.class_ids[..., 0] == arrays.class_id[:, None, None, None]
        edges = np.linspace(0, 1, BINS + 1)
        confidence = arrays.confidence.astype(np.float64)
        self.own += np.histogram(confidence[own], edges)[0]
        self.others += np.histogram(confidence[~own], edges)[0]
        self.images += len(arrays)
        self.shards += 1

    @property
    def tokens(self) -> int:
        return int(self.own.sum() + self.others.sum())


def confidence_figure(counts: ConfidenceCounts, note: str, path: str | Path) -> None:
    """Write the histogram as PNG. Raises TargetError."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.add_subplot()
    left = np.arange(BINS) / BINS
    shares = [part / max(counts.tokens, 1) for part in (counts.own, counts.others)]
    axis.bar(left, shares[0], 1 / BINS, align="edge", color=CONFIDENT, label="the image's own class")
    axis.bar(
        left, shares[1], 1 / BINS, bottom=shares[0], align="edge", color=UNCONFIDENT, hatch="///", label="other classes"
    )
    axis.set_xlim(0, 1)
    axis.set_xlabel("confidence: probability of a token's best class")
    axis.set_ylabel("share of tokens")
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.set_title(note, fontsize=9)
    axis.legend(fontsize=8)
    save_figure(figure, path)


def histogram_bars(counts: ConfidenceCounts, note: str) -> dict[str, Any]:
    """The histogram's bars in the coordinates of the template's drawing (62 to 428 across, 224 up to 12)."""
    total = max(counts.tokens, 1)
    most = max(float((counts.own + counts.others).max()) / total, 1e-9)
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0) if most <= 5 * step)
    top = step * np.ceil(most / step - 1e-9)
    bars, rows = [], []
    for number in range(BINS):
        where = f"{number / BINS:.2f}–{(number + 1) / BINS:.2f}"
        floor = 224.0
        for kind, (count, what) in enumerate(((counts.own, "own class"), (counts.others, "other classes"))):
            share = float(count[number]) / total
            height = 212 * share / top
            floor -= height
            bar = {"kind": kind, "x": 62 + 366 * number / BINS, "y": floor, "width": 366 / BINS - 1, "height": height}
            bars += [bar | {"text": f"{where}: {share:.1%} of tokens, {what}"}] if height > 0 else []
        rows.append((where, f"{counts.own[number]:,}", f"{counts.others[number]:,}"))
    ticks = [
        {"place": 224 - 212 * share / top, "text": f"{share:.0%}"}
        for share in np.arange(0, top + step / 2, step).tolist()
    ]
    return {"note": f"{note}.", "tokens": f"{counts.tokens:,}", "bars": bars, "rows": rows, "ticks": ticks}
