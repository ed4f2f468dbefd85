"""LambdaLoss: pairwise logistic losses whose weights make them bounds of the nDCG lost.

Wang et al., The LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018. With
G_i = (2^label_i - 1) / (best DCG) and D(r) = log2(1 + r) at the rank r_i by score.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from peftrank.errors import ConfigError
from peftrank.losses._dcg import discounts, normalised_gains, worst_ranks
from peftrank.losses._terms import better, both, check_positive, differences, weighted_sum


def lambdaloss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    scheme: Literal["ndcg_loss1", "ndcg_loss2", "ndcg_loss2++"] = "ndcg_loss2++",
    sigma: float = 1.0,
    mu: float = 10.0,
) -> Tensor:
    """Returns sum over pairs of importance_ij log2(1 + exp(-sigma (s_i - s_j))).

    The importance is a constant: no gradient runs through the ranks.

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the pairs whose first candidate i it belongs to.
        scheme: The importance. `ndcg_loss1`: G_i / D(r_i), over all pairs i != j. The others
            are over pairs label_i > label_j: `ndcg_loss2` has |G_i - G_j| delta_ij, where
            delta_ij = 1/D(d) - 1/D(d + 1) at the distance d = |r_i - r_j|; `ndcg_loss2++` has
            |G_i - G_j| (mu delta_ij + rho_ij), where rho_ij = |1/D(r_i) - 1/D(r_j)| is
            LambdaRank's.
        sigma: Steepness of the logistic.
        mu: How much delta counts beside rho in `ndcg_loss2++`; the paper's is 10.

    Raises:
        ConfigError: an unknown scheme, or sigma not above 0.
    """
    check_positive("sigma", sigma)
    gains, ranks = normalised_gains(labels, mask), worst_ranks(scores, labels, mask)
    at_rank = discounts(ranks)
    if scheme == "ndcg_loss1":
        itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
        pairs = both(mask) & ~itself
        importance = (gains * at_rank).unsqueeze(-1) * pairs
    elif scheme in ("ndcg_loss2", "ndcg_loss2++"):
        pairs = better(labels, mask)
        distance = differences(ranks, pairs).abs().clamp_min(1.0)
        importance = discounts(distance) - discounts(distance + 1.0)
        if scheme == "ndcg_loss2++":
            importance = mu * importance + differences(at_rank, pairs).abs()
        importance = importance * differences(gains, pairs)
    else:
        known = "ndcg_loss1, ndcg_loss2 or ndcg_loss2++"
        raise ConfigError(f"loss.scheme is {scheme!r}; expected {known}")
    logistic = torch.nn.functional.softplus(-sigma * differences(scores, pairs)) / math.log(2.0)
    return weighted_sum((importance * logistic).sum(dim=-1), mask, weights)
