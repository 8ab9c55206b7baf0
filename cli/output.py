"""What commands print when they are done."""

from collections.abc import Mapping
from typing import Any

_SCORES = (("top1", "top-1"), ("top5", "top-5"), ("token_top1", "token top-1"))


def percent(share: float | None) -> str:
    """A share in [0, 1] as per cent; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.2f} %"


def scores_line(result: Mapping[str, Any]) -> str:
    """The accuracies that a result holds, in one line; empty where it holds none."""
    return ", ".join(f"{label} {percent(result[name])}" for name, label in _SCORES if result.get(name) is not None)


def run_line(stage: str, out: str, summary: Mapping[str, Any]) -> str:
    """Where a training run lies, how long it took and how good it is."""
    facts = [f"{summary['epochs']} epochs in {summary['train_seconds']:,.0f} s", f"loss {summary['loss']:.3f}"]
    scores = scores_line(summary)
    return f"{stage}: {out} ({', '.join([*facts, scores] if scores else facts)})"
