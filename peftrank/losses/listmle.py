"""ListMLE: negative Plackett-Luce log-likelihood of the order that the labels give.

Xia et al., Listwise Approach to Learning to Rank: Theory and Algorithm, ICML 2008. Labels have
ties (most candidates of a click log are 0), and the paper leaves them open. Here a tied candidate
competes with everything not above it (Breslow's treatment of ties), and the order inside the
lowest grade, about which nothing is known, is left out. Distinct labels give the paper's loss;
one positive gives softmax cross-entropy. No random tie-breaking is needed.
"""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._terms import both, check_label_smoothing, softmax_terms, weighted_sum


def listmle(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns sum_i [log sum_{j: label_j <= label_i} exp(s_j) - s_i] per slate.

    The outer sum runs over candidates above the lowest label of their slate.

    Args:
        scores: (S, N).
        labels: (S, N).
        mask: (S, N) bool.
        weights: (S, N), multiplied into the outer sum's terms.
        label_smoothing: Of each draw, the part of the mass that is spread evenly over what is
            still to be drawn.

    Raises:
        ConfigError: label_smoothing outside [0, 1).
    """
    check_label_smoothing(label_smoothing)
    scores = scores.masked_fill(~mask, 0.0)
    lowest = labels.masked_fill(~mask, float("inf")).amin(dim=-1, keepdim=True)
    above = mask & (labels > lowest)
    rivals = both(mask) & (labels.unsqueeze(-2) <= labels.unsqueeze(-1))
    terms = softmax_terms(scores, rivals, label_smoothing)
    return weighted_sum(terms.masked_fill(~above, 0.0), mask, weights)
