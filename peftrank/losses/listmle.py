"""ListMLE: negative Plackett-Luce log-likelihood of the order that the labels give.

Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008. Labels have
ties (most candidates of a click log are 0), and the paper leaves them open. Here a tied candidate
competes with everything not above it (Breslow's treatment of ties), and the order inside the
lowest grade, about which nothing is known, is left out. Distinct labels give the paper's loss;
one positive gives softmax cross-entropy. No random tie-breaking is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._terms import both, weighted_sum


def listmle(scores: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns sum_i [log sum_{j: label_j <= label_i} exp(s_j) - s_i] per slate.

    The outer sum runs over candidates above the lowest label of their slate. All (S, N);
    `weights` multiply the outer sum's terms.
    """
    scores = scores.masked_fill(~mask, 0.0)
    lowest = labels.masked_fill(~mask, float("inf")).amin(dim=-1, keepdim=True)
    above = mask & (labels > lowest)
    rivals = both(mask) & (labels.unsqueeze(-2) <= labels.unsqueeze(-1))
    floor = torch.finfo(scores.dtype).min
    denominators = torch.logsumexp(scores.unsqueeze(-2).masked_fill(~rivals, floor), dim=-1)
    return weighted_sum((denominators - scores).masked_fill(~above, 0.0), mask, weights)
