"""Scores of trained models."""

from stl_offline.evaluation.corruptions import check_corruptions_can_run, corrupt, parse_corruptions
from stl_offline.evaluation.figures import SUITE_NAMES, describe_transform, result_lines, score_rows, top1_by_kind
from stl_offline.evaluation.measures import BENCHMARK_CORRUPTIONS, EXTRA_CORRUPTIONS, NOT_FINITE, SEVERITIES
from stl_offline.evaluation.robust import RESULT_VERSION, evaluate_suites
from stl_offline.evaluation.scoring import (
    Scores,
    Validation,
    evaluate,
    evaluate_model,
    match_classes,
    scoring_loader,
)

__all__ = [
    "BENCHMARK_CORRUPTIONS",
    "EXTRA_CORRUPTIONS",
    "NOT_FINITE",
    "RESULT_VERSION",
    "SEVERITIES",
    "SUITE_NAMES",
    "Scores",
    "Validation",
    "check_corruptions_can_run",
    "corrupt",
    "describe_transform",
    "evaluate",
    "evaluate_model",
    "evaluate_suites",
    "match_classes",
    "parse_corruptions",
    "result_lines",
    "score_rows",
    "scoring_loader",
    "top1_by_kind",
]
