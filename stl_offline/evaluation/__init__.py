"""Scores of trained models."""

from stl_offline.evaluation.job import evaluate
from stl_offline.evaluation.scoring import Scores, evaluate_model, match_classes, scoring_loader
from stl_offline.evaluation.validation import Validation

__all__ = ["Scores", "Validation", "evaluate", "evaluate_model", "match_classes", "scoring_loader"]
