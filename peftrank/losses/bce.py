"""Binary cross-entropy: every candidate is a click or no click of its own (pointwise)."""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.losses._terms import check_label_smoothing, weighted_sum


def bce(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    positive_above: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean logistic loss over a slate's candidates.

    Args:
        scores: (S, N) logits.
        labels: (S, N); above `positive_above` counts as a click.
        mask: (S, N) bool.
        weights: (S, N), multiplied into each candidate's term.
        positive_above: With ratings 1 to 5, 3.5 makes 4 and 5 the positives.
        label_smoothing: The probability that a click or its absence is noise: targets are half
            of it and 1 less half of it, instead of 0 and 1.

    Raises:
        ConfigError: label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    targets = (labels > positive_above).to(scores.dtype)
    targets = targets * (1.0 - label_smoothing) + label_smoothing / 2
    terms = torch.nn.functional.binary_cross_entropy_with_logits(
        scores.masked_fill(~mask, 0.0), targets, reduction="none"
    )
    return weighted_sum(terms, mask, weights) / mask.sum(dim=-1).clamp_min(1)
