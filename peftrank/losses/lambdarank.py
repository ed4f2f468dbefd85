"""LambdaRank: pairwise logistic loss weighted by how much a swap changes nDCG.

Burges, From RankNet to LambdaRank to LambdaMART, MSR-TR-2010-82; as a proper loss: Wang et al.,
The LambdaLoss Framework for Ranking Metric Optimization, CIKM 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lambdarank(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    sigma: float = 1.0,
    k: int | None = None,
) -> Tensor:
    """Returns sum over pairs label_i > label_j of |delta nDCG_ij| log(1 + exp(-sigma (s_i - s_j))).

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the pairs whose better candidate it belongs to.
        sigma: Steepness of the logistic.
        k: nDCG cut-off; pairs with both ranks beyond it weigh nothing. None: no cut-off.
    """
    gains = (torch.exp2(labels) - 1.0).masked_fill(~mask, 0.0)
    with torch.no_grad():
        order = scores.masked_fill(~mask, float("-inf")).argsort(
            dim=-1, descending=True, stable=True
        )
        ranks = order.argsort(dim=-1) + 1  # (S, N), 1-based
        discounts = _discounts(ranks, k)
        ideal_ranks = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
        ideal = gains.sort(dim=-1, descending=True).values * _discounts(ideal_ranks, k)
        max_dcg = ideal.sum(dim=-1).clamp_min(torch.finfo(gains.dtype).tiny)
        swap = _pairs(gains).abs() * _pairs(discounts).abs() / max_dcg[:, None, None]
    better = mask.unsqueeze(-1) & mask.unsqueeze(-2) & (_pairs(labels) > 0)
    swap = torch.where(better, swap, torch.zeros_like(swap))
    if weights is not None:
        swap = swap * weights.unsqueeze(-1)
    differences = torch.where(better, _pairs(scores), torch.zeros_like(swap))
    return (swap * torch.nn.functional.softplus(-sigma * differences)).sum(dim=(-2, -1))


def _discounts(ranks: Tensor, k: int | None) -> Tensor:
    discounts = 1.0 / torch.log2(1.0 + ranks.to(torch.float32))
    return discounts if k is None else discounts.masked_fill(ranks > k, 0.0)


def _pairs(values: Tensor) -> Tensor:
    """Returns values_i - values_j: (S, N) -> (S, N, N)."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)
