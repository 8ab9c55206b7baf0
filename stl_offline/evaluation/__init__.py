"""Scores of trained models."""

from stl_offline.evaluation.scoring import (
    Scores,
    Validation,
    evaluate,
    evaluate_model,
    match_classes,
    scoring_loader,
)

__all__ = ["Scores", "Validation", "evaluate", "evaluate_model", "match_classes", "scoring_loader"]
