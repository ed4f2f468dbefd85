"""Softmax-DPO: prefer the positives by more than a frozen reference does.

Chen et al., On Softmax Direct Preference Optimization for Recommendation (S-DPO), NeurIPS 2024,
arXiv 2406.09215. -log sigmoid(-log sum_j exp(r_j - r_i)) there is the softmax loss of the
rewards r = beta (log p - log p_reference), and adding a constant to a slate's scores changes
nothing, so any scores that are log-probabilities up to a constant will do.
"""

from __future__ import annotations

from torch import Tensor

from peftrank.errors import ConfigError
from peftrank.losses._terms import check_positive
from peftrank.losses.softmax import softmax


def softmax_dpo(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    reference: Tensor | None = None,
    beta: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the softmax loss of the rewards beta (score - reference).

    Args:
        scores: (S, N).
        labels: (S, N), >= 0. Each relevant candidate is preferred to those labelled below it.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the relevant candidates' terms.
        reference: (S, N), the same candidates' scores under the frozen reference. The caller
            computes it; it is no option of a configuration.
        beta: How strongly the scores are held to the reference: the smaller, the further they
            must move for the same loss.
        label_smoothing: As in `softmax`, on the rewards. With one rival it is conservative DPO
            (Mitchell, A note on DPO with noisy preferences, 2023) with half of it as the chance
            that a preference is the other way.

    Raises:
        ConfigError: no reference, a beta not above 0, or label_smoothing outside [0, 1).
    """
    check_positive("beta", beta)
    if reference is None:
        raise ConfigError(
            "softmax_dpo needs the scores of a frozen reference for the same candidates, "
            "reference=(S, N), and got none. Without a reference, use the loss softmax."
        )
    rewards = beta * (scores - reference.detach())
    return softmax(rewards, labels, mask, weights, label_smoothing=label_smoothing)
