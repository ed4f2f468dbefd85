"""Margin loss: each better candidate should score above each worse one by a margin (hinge).

Herbrich et al., Large Margin Rank Boundaries for Ordinal Regression, 2000; the loss of Ranking SVM
(Joachims, KDD 2002). Pairs that have the margin give no gradient.
"""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._terms import better, check_positive, differences, weighted_sum


def margin(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    margin: float = 1.0,
) -> Tensor:
    """Returns the mean over pairs label_i > label_j of max(0, margin - (s_i - s_j)).

    Args:
        scores: (S, N).
        labels: (S, N).
        mask: (S, N) bool.
        weights: (S, N), multiplied into the pairs whose better candidate it belongs to.
        margin: In units of the scores.

    Raises:
        ConfigError: a margin not above 0.
    """
    check_positive("margin", margin)
    pairs = better(labels, mask)
    terms = (margin - differences(scores, pairs)).relu().masked_fill(~pairs, 0.0).sum(dim=-1)
    return weighted_sum(terms, mask, weights) / pairs.sum(dim=(-2, -1)).clamp_min(1)
