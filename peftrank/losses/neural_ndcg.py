"""NeuralNDCG: 1 - nDCG of a smooth sort.

Pobrotyn and Bialobrzeski, NeuralNDCG: Direct Optimisation of a Ranking Metric via Differentiable
Relaxation of Sorting, 2021, arXiv 2102.07831; the deterministic variant. The sort is NeuralSort
(Grover et al., ICLR 2019), made doubly stochastic by Sinkhorn scaling, in logarithms here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._dcg import discounts, ndcg_shortfall, normalised_gains
from peftrank.losses._terms import both, check_positive, differences, positions, weighted_sum


def neural_ndcg(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    iterations: int = 50,
    k: int | None = None,
) -> Tensor:
    """Returns 1 - nDCG at k, with each candidate spread over the ranks by a smooth sort.

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into each relevant candidate's part of 1 - nDCG.
        temperature: In units of the scores. Towards 0 the loss is 1 - nDCG itself, whose
            gradient is 0.
        iterations: Sinkhorn scalings of columns and rows. Always all of them, so that a slate's
            loss does not depend on its batch.
        k: nDCG cut-off. None: no cut-off.

    Raises:
        ConfigError: temperature, iterations or k not above 0.
    """
    check_positive("temperature", temperature)
    check_positive("iterations", iterations)
    gains = normalised_gains(labels, mask, k)
    sort = _smooth_sort(scores.masked_fill(~mask, 0.0), mask, temperature, iterations)
    at_rank = discounts(positions(scores), k).unsqueeze(-1)
    return weighted_sum(ndcg_shortfall(gains, (sort * at_rank).sum(dim=-2)), mask, weights)


def _smooth_sort(scores: Tensor, mask: Tensor, temperature: float, iterations: int) -> Tensor:
    """Returns how much of each candidate lies at each rank: (S, N ranks, N candidates)."""
    ranks, n = positions(scores), mask.sum(dim=-1, keepdim=True)  # (N,), (S, 1)
    distances = differences(scores, both(mask)).abs().sum(dim=-1)  # (S, N)
    factors = n + 1 - 2 * ranks  # (S, N ranks)
    logits = factors.unsqueeze(-1) * scores.unsqueeze(-2) - distances.unsqueeze(-2)
    rank_exists = (ranks <= n).unsqueeze(-1)
    real = rank_exists & mask.unsqueeze(-2)
    # Padding is sorted among itself: every row and column keeps a finite entry.
    padding = ~rank_exists & ~mask.unsqueeze(-2)
    logits = (logits / temperature).masked_fill(~real, torch.finfo(scores.dtype).min)
    log_sort = torch.log_softmax(logits.masked_fill(padding, 0.0), dim=-1)
    for _ in range(iterations):
        log_sort = log_sort - torch.logsumexp(log_sort, dim=-2, keepdim=True)
        log_sort = log_sort - torch.logsumexp(log_sort, dim=-1, keepdim=True)
    sort = log_sort.exp().masked_fill(~real, 0.0)
    # Rows now sum to 1, columns nearly: no candidate may count more than once, or nDCG exceeds 1.
    # The bound is no part of the sort: its gradient would jump with the last bit of a sum.
    return sort / sort.sum(dim=-2, keepdim=True).detach().clamp_min(1.0)
