"""RankNet: each better candidate should score above each worse one (pairwise logistic).

Burges et al., Learning to Rank using Gradient Descent, ICML 2005.
"""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._terms import (
    better,
    check_label_smoothing,
    check_positive,
    differences,
    logistic_terms,
    weighted_sum,
)


def ranknet(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    sigma: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean over pairs label_i > label_j of log(1 + exp(-sigma (s_i - s_j))).

    A mean and not a sum, so that a slate of many pairs does not outweigh one of few.

    Args:
        scores: (S, N).
        labels: (S, N).
        mask: (S, N) bool.
        weights: (S, N), multiplied into the pairs whose better candidate it belongs to.
        sigma: Steepness of the logistic.
        label_smoothing: Half of it is the chance that a pair is the other way round. The paper's
            target probability of a pair is then 1 less that half.

    Raises:
        ConfigError: a sigma not above 0, or label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    check_positive("sigma", sigma)
    pairs = better(labels, mask)
    terms = logistic_terms(sigma * differences(scores, pairs), label_smoothing)
    terms = terms.masked_fill(~pairs, 0.0).sum(dim=-1)
    return weighted_sum(terms, mask, weights) / pairs.sum(dim=(-2, -1)).clamp_min(1)
