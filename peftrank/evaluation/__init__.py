"""Evaluation: metrics with confidence intervals, baselines beside them, and the report."""

from peftrank.evaluation.evaluate import Evaluation, compare, evaluate, evaluate_scores
from peftrank.evaluation.table import ZERO_SHOT, baseline_rows, cold_slates

__all__ = [
    "ZERO_SHOT",
    "Evaluation",
    "baseline_rows",
    "cold_slates",
    "compare",
    "evaluate",
    "evaluate_scores",
]
