"""The parts of nDCG that losses are made of: gains, discounts and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._terms import both, check_positive, positions


def normalised_gains(labels: Tensor, mask: Tensor, k: int | None = None) -> Tensor:
    """Returns (2^label - 1) / (the best possible DCG at k), 0 at padding: (S, N).

    All are 0 in a slate without a relevant candidate.

    Raises:
        ConfigError: k below 1.
    """
    if k is not None:
        check_positive("k", k)
    labels = labels.masked_fill(~mask, 0.0)
    top = labels.amax(dim=-1, keepdim=True)
    gains = torch.exp2(labels - top) - torch.exp2(-top)  # / 2^top: no overflow with counts
    ideal = gains.sort(dim=-1, descending=True).values * discounts(positions(gains), k)
    return divide(gains, ideal.sum(dim=-1, keepdim=True))


def divide(values: Tensor, total: Tensor) -> Tensor:
    """Returns values / total for total >= 0; where total is 0, so are the values, and the result.

    Args:
        values: (S, N).
        total: (S, 1).
    """
    return values / total.clamp_min(torch.finfo(values.dtype).tiny)


def discounts(ranks: Tensor, k: int | None = None) -> Tensor:
    """Returns 1 / log2(1 + rank), 0 for ranks beyond k. Any shape; ranks > 0, whole or not."""
    values = 1.0 / torch.log2(1.0 + ranks)
    return values if k is None else values.masked_fill(ranks > k, 0.0)


def worst_ranks(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Returns the 1-based rank of each candidate, with ties broken for the worst: (S, N).

    Among equal scores the lower label comes first, so that a tie is still an error to learn from
    (all scores are equal at the start of many trainings). Candidates equal in both get the mean
    of their ranks. The order of the input never matters.
    """
    pairs = both(mask)
    score_i, score_j = scores.unsqueeze(-1), scores.unsqueeze(-2)
    label_i, label_j = labels.unsqueeze(-1), labels.unsqueeze(-2)
    tied = pairs & (score_j == score_i)
    ahead = (pairs & (score_j > score_i)) | (tied & (label_j < label_i))
    equal = tied & (label_j == label_i)
    ranks = ahead.sum(dim=-1) + (equal.sum(dim=-1).clamp_min(1) + 1) / 2
    return ranks.to(scores.dtype)


def ndcg_shortfall(gains: Tensor, expected_discounts: Tensor) -> Tensor:
    """Returns each candidate's part of 1 - nDCG: (S, N) each -> (S, N).

    The 1 is shared out by gain. A part may be negative (a small gain ranked high); over a slate
    they sum to 1 - nDCG.

    Args:
        gains: From `normalised_gains`.
        expected_discounts: The discount at each candidate's rank, or a smooth stand-in for it.
    """
    return divide(gains, gains.sum(dim=-1, keepdim=True)) - gains * expected_discounts
