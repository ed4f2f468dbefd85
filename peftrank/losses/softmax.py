"""Softmax loss with several positives: each against the candidates labelled below it.

ListNet gives the positives of a slate one probability mass to share, so the better of two
positives is pushed down for the other's sake. Here positives do not compete with each other: the
loss goes to 0 once all stand above all negatives. With one positive both are the softmax
cross-entropy. Pasumarthi et al., TF-Ranking, KDD 2019, have it as the unique softmax loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._terms import better, check_label_smoothing, softmax_terms, weighted_sum


def softmax(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean over relevant i of log(1 + sum_{j: label_j < label_i} exp(s_j - s_i)).

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the terms of the relevant candidates.
        label_smoothing: The part of each positive's mass that is spread evenly over it and its
            rivals.

    Raises:
        ConfigError: label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    scores = scores.masked_fill(~mask, 0.0)
    itself = torch.eye(scores.shape[-1], dtype=torch.bool, device=scores.device)
    rivals = better(labels, mask) | itself
    relevant = mask & (labels > 0)
    terms = softmax_terms(scores, rivals, label_smoothing).masked_fill(~relevant, 0.0)
    return weighted_sum(terms, mask, weights) / relevant.sum(dim=-1).clamp_min(1)
