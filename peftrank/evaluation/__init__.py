"""Evaluation: metrics with confidence intervals, baselines beside them, and the report."""

from peftrank.evaluation.evaluate import Evaluation, compare, evaluate, evaluate_scores
from peftrank.evaluation.table import baseline_rows, cold_slates

__all__ = [
    "Evaluation",
    "baseline_rows",
    "cold_slates",
    "compare",
    "evaluate",
    "evaluate_scores",
]
