"""Binary cross-entropy: every candidate is a click or no click of its own (pointwise)."""

from __future__ import annotations

import torch
from torch import Tensor


def bce(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    positive_above: float = 0.0,
) -> Tensor:
    """Returns the mean logistic loss over a slate's candidates.

    Args:
        scores: (S, N) logits.
        labels: (S, N); above `positive_above` counts as a click.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the clicked candidates' terms.
        positive_above: With ratings 1 to 5, 3.5 makes 4 and 5 the positives.
    """
    targets = (labels > positive_above).to(scores.dtype)
    terms = torch.nn.functional.binary_cross_entropy_with_logits(
        scores.masked_fill(~mask, 0.0), targets, reduction="none"
    )
    if weights is not None:
        terms = terms * torch.where(targets > 0, weights, torch.ones_like(weights))
    return terms.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp_min(1)
