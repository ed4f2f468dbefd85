"""How good a ranking is: means over slates with bootstrap confidence intervals.

Slates without a relevant candidate have no accuracy. They are left out of the means and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftrank.metrics import per_slate
from peftrank.ranker import Ranker
from peftrank.types import Slate

_RESAMPLES = 2000
_LEVEL = 0.95


@dataclass(frozen=True)
class Evaluation:
    """One ranker's accuracy on some slates."""

    name: str
    values: Mapping[str, NDArray[np.float64]]
    """Metric -> value of each slate (S,), NaN where a slate has no relevant candidate."""

    @property
    def counted(self) -> int:
        """Slates in the means."""
        return int(np.sum(~np.isnan(next(iter(self.values.values())))))

    @property
    def left_out(self) -> int:
        """Slates without a relevant candidate."""
        return len(next(iter(self.values.values()))) - self.counted

    def only(self, slates: Sequence[int]) -> Evaluation:
        """Returns the evaluation of some of the slates, given by index."""
        chosen = np.asarray(slates, dtype=np.intp)
        return Evaluation(self.name, {m: values[chosen] for m, values in self.values.items()})

    def mean(self, metric: str) -> float:
        """Returns the mean over the counted slates, NaN if there is none."""
        return _mean(_present(self.values[metric]))

    def interval(self, metric: str) -> tuple[float, float]:
        """Returns the 95% bootstrap percentile interval of the mean (Efron & Tibshirani 1993)."""
        return _interval(_present(self.values[metric]))


def evaluate_scores(
    name: str,
    slates: Sequence[Slate],
    scores: Sequence[Sequence[float]],
    metrics: Sequence[str],
) -> Evaluation:
    """Returns the evaluation of given scores (one per candidate, in candidate order)."""
    return Evaluation(name, {metric: per_slate(metric, slates, scores) for metric in metrics})


def evaluate(
    ranker: Ranker,
    slates: Sequence[Slate],
    *,
    domain: str,
    metrics: Sequence[str] = ("ndcg@10", "mrr", "hit@1"),
    name: str | None = None,
) -> Evaluation:
    """Returns the evaluation of a loaded domain on labelled slates.

    Raises:
        ConfigError: unknown metric or domain, or a slate without labels.
    """
    return evaluate_scores(name or domain, slates, ranker.score(slates, domain=domain), metrics)


def compare(a: Evaluation, b: Evaluation, metric: str) -> tuple[float, float, float]:
    """Returns the mean difference a - b over the same slates and its paired 95% interval.

    The interval resamples slates, keeping both values of a slate together. NaN if no slate has
    both values.
    """
    differences = _present(a.values[metric] - b.values[metric])
    return (_mean(differences), *_interval(differences))


def _present(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[~np.isnan(values)]


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _interval(values: NDArray[np.float64]) -> tuple[float, float]:
    if len(values) == 0:
        return float("nan"), float("nan")
    generator = np.random.default_rng(0)
    means = [
        values[generator.integers(len(values), size=len(values))].mean() for _ in range(_RESAMPLES)
    ]
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
