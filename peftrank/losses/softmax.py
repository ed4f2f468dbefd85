"""Softmax loss with several positives: each against the candidates labelled below it.

ListNet gives the positives of a slate one probability mass to share, so the better of two
positives is pushed down for the other's sake. Here positives do not compete with each other: the
loss goes to 0 once all stand above all negatives. With one positive both are the softmax
cross-entropy. Pasumarthi et al., TF-Ranking, KDD 2019, have it as the unique softmax loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._terms import better, weighted_sum


def softmax(scores: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean over relevant i of log(1 + sum_{j: label_j < label_i} exp(s_j - s_i)).

    All (S, N), labels >= 0; `weights` multiply the terms of the relevant candidates.
    """
    scores = scores.masked_fill(~mask, 0.0)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    rivals = better(labels, mask) | itself
    floor = torch.finfo(scores.dtype).min
    terms = torch.logsumexp(scores.unsqueeze(-2).masked_fill(~rivals, floor), dim=-1) - scores
    relevant = mask & (labels > 0)
    terms = terms.masked_fill(~relevant, 0.0)
    return weighted_sum(terms, mask, weights) / relevant.sum(dim=-1).clamp_min(1)
