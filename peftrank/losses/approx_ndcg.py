"""ApproxNDCG: 1 - nDCG with smooth ranks.

Qin, Liu and Li, A General Approximation Framework for Direct Optimization of Information Retrieval
Measures, Information Retrieval 2010 (their alpha is 1 / temperature).
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._dcg import discounts, ndcg_shortfall, normalised_gains
from peftrank.losses._terms import both, check_positive, differences, weighted_sum


def approx_ndcg(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """Returns 1 - nDCG at the ranks 1 + sum_{j != i} sigmoid((s_j - s_i) / temperature).

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into each relevant candidate's part of 1 - nDCG.
        temperature: In units of the scores. Towards 0 the loss is 1 - nDCG itself, whose
            gradient is 0.

    Raises:
        ConfigError: a temperature not above 0.
    """
    check_positive("temperature", temperature)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    pairs = both(mask) & ~itself
    behind = torch.sigmoid(-differences(scores, pairs) / temperature).masked_fill(~pairs, 0.0)
    ranks = 1.0 + behind.sum(dim=-1)
    terms = ndcg_shortfall(normalised_gains(labels, mask), discounts(ranks))
    return weighted_sum(terms, mask, weights)
