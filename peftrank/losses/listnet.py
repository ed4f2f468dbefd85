"""ListNet: softmax cross-entropy between the scores and a target distribution over the slate.

Cao et al., Learning to Rank: From Pairwise Approach to Listwise Approach, ICML 2007 (top-1).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peftrank.errors import ConfigError


def listnet(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    gain: Literal["linear", "exponential", "softmax"] = "linear",
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
    """
    labels = labels.masked_fill(~mask, 0.0)
    if gain == "linear":
        target = labels
    elif gain == "exponential":
        target = torch.exp2(labels) - 1.0
    elif gain == "softmax":
        target = torch.softmax(labels.masked_fill(~mask, float("-inf")), dim=-1)
    else:
        raise ConfigError(f"loss.gain is {gain!r}; expected linear, exponential or softmax")
    total = target.sum(dim=-1, keepdim=True)
    target = target / total.clamp_min(torch.finfo(target.dtype).tiny)
    target = torch.where(labels.sum(dim=-1, keepdim=True) > 0, target, torch.zeros_like(target))
    if weights is not None:
        target = target * weights
    log_q = torch.log_softmax(scores.masked_fill(~mask, torch.finfo(scores.dtype).min), dim=-1)
    return -(target * log_q.masked_fill(~mask, 0.0)).sum(dim=-1)
