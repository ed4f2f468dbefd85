"""Area under the ROC curve of one slate (averaged over slates: GAUC, arXiv 1706.06978)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def auc(labels: NDArray[np.float64], scores: NDArray[np.float64]) -> float:
    """Returns P(a relevant candidate scores above an irrelevant one), a tie counting one half.

    Args:
        labels: (N,), above 0 is relevant.
        scores: (N,).

    Returns:
        NaN when all candidates are relevant, or none is.
    """
    positive, negative = scores[labels > 0], scores[labels <= 0]
    if len(positive) == 0 or len(negative) == 0:
        return float("nan")
    differences = positive[:, None] - negative[None, :]
    return float(np.mean((differences > 0) + 0.5 * (differences == 0)))
