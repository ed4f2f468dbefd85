"""What the losses share: weighted sums over candidates, and pairs of candidates.

Pairs are (S, N, N): [s, i, j] is candidate i against candidate j of slate s.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftrank.errors import ConfigError


def weighted_sum(terms: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the sum of a slate's terms, each times its candidate's weight: (S, N) -> (S,)."""
    terms = terms.masked_fill(~mask, 0.0)
    if weights is not None:
        terms = terms * weights.masked_fill(~mask, 0.0)
    return terms.sum(dim=-1)


def both(mask: Tensor) -> Tensor:
    """Returns where both candidates of a pair are real: (S, N) bool -> (S, N, N) bool."""
    return mask.unsqueeze(-1) & mask.unsqueeze(-2)


def better(labels: Tensor, mask: Tensor) -> Tensor:
    """Returns where i is labelled above j, both real: (S, N, N) bool."""
    return both(mask) & (labels.unsqueeze(-1) > labels.unsqueeze(-2))


def differences(values: Tensor, pairs: Tensor) -> Tensor:
    """Returns values_i - values_j, 0 outside `pairs`: (S, N) and (S, N, N) bool -> (S, N, N)."""
    return (values.unsqueeze(-1) - values.unsqueeze(-2)).masked_fill(~pairs, 0.0)


def softmax_terms(scores: Tensor, rivals: Tensor, label_smoothing: float) -> Tensor:
    """Returns each candidate's cross-entropy against its rivals: (S, N).

    log sum_j exp(s_j) - (1 - e) s_i - e mean_j s_j over the rivals j of i, where e is the part of
    the target's mass that is spread evenly over them.

    Args:
        scores: (S, N), finite at padding too.
        rivals: (S, N, N) bool; [s, i, j] = i competes with j. A candidate is among its own rivals.
        label_smoothing: e.
    """
    others, floor = scores.unsqueeze(-2), torch.finfo(scores.dtype).min
    even = (others * rivals).sum(dim=-1) / rivals.sum(dim=-1).clamp_min(1)
    denominators = torch.logsumexp(others.masked_fill(~rivals, floor), dim=-1)
    return denominators - scores + label_smoothing * (scores - even)


def logistic_terms(margins: Tensor, label_smoothing: float) -> Tensor:
    """Returns log(1 + exp(-x)) + e x / 2 of margins x, of which a part e / 2 is the other way.

    It is (1 - e / 2) log(1 + exp(-x)) + e / 2 log(1 + exp(x)). Any shape.
    """
    return torch.nn.functional.softplus(-margins) + label_smoothing / 2 * margins


def check_positive(option: str, value: float) -> None:
    """Raises ConfigError unless an option's value is above 0."""
    if not value > 0:
        raise ConfigError(f"loss.{option} is {value!r}; expected a number above 0")


def check_label_smoothing(value: float) -> None:
    """Raises ConfigError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigError(f"loss.label_smoothing is {value!r}; expected 0 or more, below 1")


def positions(scores: Tensor) -> Tensor:
    """Returns 1, 2, ..., N in the type and on the device of `scores` (S, N)."""
    return torch.arange(1, scores.shape[-1] + 1, dtype=scores.dtype, device=scores.device)
