"""InfoNCE within the slate: each positive against the negatives, at a temperature.

van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018. The
negatives are those of the slate; no other slate's candidates are drawn in.
"""

from __future__ import annotations

from torch import Tensor

from peftrank.losses._terms import check_positive
from peftrank.losses.softmax import softmax


def infonce(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    positive_above: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the mean over positives i of log(1 + sum_{negatives j} exp((s_j - s_i) / t)).

    Args:
        scores: (S, N).
        labels: (S, N); above `positive_above` is a positive, the rest are negatives.
        mask: (S, N) bool.
        weights: (S, N), multiplied into the positives' terms.
        temperature: t. Low: the hardest negatives take most of the gradient. Scores that are
            cosines need about 0.05.
        positive_above: With ratings 1 to 5, 3.5 makes 4 and 5 the positives.
        label_smoothing: As in `softmax`.

    Raises:
        ConfigError: a temperature not above 0, or label_smoothing outside [0, 1).
    """
    check_positive("temperature", temperature)
    positive = (labels > positive_above).to(scores.dtype)
    scaled = scores / temperature
    return softmax(scaled, positive, mask, weights, label_smoothing=label_smoothing)
