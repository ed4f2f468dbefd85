"""Mean squared error: the score is a prediction of the rating itself (pointwise)."""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._terms import weighted_sum


def mse(scores: Tensor, labels: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Returns the mean of (score - label)^2 over a slate's candidates.

    All (S, N); `weights` multiply each candidate's term.
    """
    terms = (scores.masked_fill(~mask, 0.0) - labels.masked_fill(~mask, 0.0)).square()
    return weighted_sum(terms, mask, weights) / mask.sum(dim=-1).clamp_min(1)
