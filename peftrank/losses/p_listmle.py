"""Position-aware ListMLE: ListMLE in which the top of the list weighs more.

Lan et al., Position-Aware ListMLE: A Sequential Learning Process for Ranking, UAI 2014.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from peftrank.errors import ConfigError
from peftrank.losses._dcg import discounts, divide
from peftrank.losses._terms import better, both, positions
from peftrank.losses.listmle import listmle


def p_listmle(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    importance: Literal["exponential", "logarithmic"] = "exponential",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns ListMLE with the term of the i-th best labelled candidate times a(i).

    Candidates with the same label share the mean of a over their positions.

    Args:
        scores: (S, N).
        labels: (S, N), >= 0.
        mask: (S, N) bool.
        weights: (S, N), multiplied into each term too.
        importance: a(i): `exponential` is the paper's 2^(n-i) - 1 for n candidates, divided by
            its value at i = 1 so that long slates do not outweigh short ones; it halves from
            each position to the next. `logarithmic` is nDCG's 1 / log2(1 + i).
        label_smoothing: As in `listmle`.

    Raises:
        ConfigError: an unknown importance, or label_smoothing outside [0, 1).
    """
    places = positions(scores)
    if importance == "exponential":
        last = torch.exp2(1.0 - mask.sum(dim=-1, keepdim=True).to(scores.dtype))
        at_place = divide((torch.exp2(1.0 - places) - last).clamp_min(0.0), 1.0 - last)  # (S, N)
    elif importance == "logarithmic":
        at_place = discounts(places).expand_as(scores)
    else:
        raise ConfigError(f"loss.importance is {importance!r}; expected exponential or logarithmic")
    above = better(labels, mask).sum(dim=-2)  # (S, N), how many are labelled above each
    tied = (both(mask) & (labels.unsqueeze(-1) == labels.unsqueeze(-2))).sum(dim=-1)
    above, tied = above.unsqueeze(-1), tied.unsqueeze(-1)
    shared = (places > above) & (places <= above + tied)  # (S, N candidates, N places)
    mean = (shared * at_place.unsqueeze(-2)).sum(dim=-1) / tied.squeeze(-1).clamp_min(1)
    weights = mean if weights is None else mean * weights
    return listmle(scores, labels, mask, weights, label_smoothing=label_smoothing)
