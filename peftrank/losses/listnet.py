"""ListNet: softmax cross-entropy between the scores and a target distribution over the slate.

Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007 (top-1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peftrank.errors import ConfigError
from peftrank.losses._dcg import divide
from peftrank.losses._terms import check_label_smoothing, weighted_sum


def listnet(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    gain: Literal["linear", "exponential", "softmax"] = "linear",
    normalise: bool = True,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns -sum_i p_i log softmax(scores)_i per slate.

    Args:
        scores: (S, N).
        labels: (S, N), >= 0. Several candidates may be relevant, in grades.
        mask: (S, N) bool.
        weights: (S, N), multiplied into each term.
        gain: The target p: `linear` is proportional to the label (one positive: the usual
            softmax cross-entropy), `exponential` to 2^label - 1, `softmax` to e^label (the
            paper's; gives irrelevant candidates mass too).
        normalise: Whether the target sums to 1. False: every click counts the same, however many
            its slate has; then, and only then, inverse propensity weights are unbiased.
        label_smoothing: The part of the target's mass that is spread evenly over the slate.

    Raises:
        ConfigError: an unknown gain, or label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    labels = labels.masked_fill(~mask, 0.0)
    if gain == "linear":
        target = labels
    elif gain == "exponential":
        target = torch.exp2(labels) - 1.0
    elif gain == "softmax":
        relevant = labels.sum(dim=-1, keepdim=True) > 0
        target = torch.softmax(labels.masked_fill(~mask, float("-inf")), dim=-1)
        target = torch.where(relevant, target, torch.zeros_like(target))
    else:
        raise ConfigError(f"loss.gain is {gain!r}; expected linear, exponential or softmax")
    if normalise:
        target = divide(target, target.sum(dim=-1, keepdim=True))
    even = target.sum(dim=-1, keepdim=True) / mask.sum(dim=-1, keepdim=True).clamp_min(1)
    target = (1.0 - label_smoothing) * target + label_smoothing * even
    log_q = torch.log_softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return weighted_sum(-target * log_q.masked_fill(~mask, 0.0), mask, weights)
