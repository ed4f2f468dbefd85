"""LambdaRank: pairwise logistic loss weighted by how much a swap changes nDCG.

Burges, From RankNet to LambdaRank to LambdaMART, MSR-TR-2010-82; as a proper loss: Wang et al.,
The LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018 (see `lambdaloss`).
"""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._dcg import discounts, normalised_gains, worst_ranks
from peftrank.losses._terms import (
    better,
    check_label_smoothing,
    check_positive,
    differences,
    logistic_terms,
    weighted_sum,
)


def lambdarank(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    sigma: float = 1.0,
    k: int | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns sum over pairs label_i > label_j of |delta nDCG_ij| log(1 + exp(-sigma (s_i - s_j))).

    The change of nDCG is a constant: no gradient runs through the ranks.

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the pairs whose better candidate it belongs to.
        sigma: Steepness of the logistic.
        k: nDCG cut-off; pairs with both ranks beyond it weigh nothing. None: no cut-off.
        label_smoothing: As in `ranknet`.

    Raises:
        ConfigError: sigma or k not above 0, or label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    check_positive("sigma", sigma)
    gains = normalised_gains(labels, mask, k)
    at_rank = discounts(worst_ranks(scores, labels, mask), k)
    pairs = better(labels, mask)
    swap = differences(gains, pairs) * differences(at_rank, pairs).abs()
    terms = swap * logistic_terms(sigma * differences(scores, pairs), label_smoothing)
    return weighted_sum(terms.sum(dim=-1), mask, weights)
