"""Popular and similar: log popularity times (a constant plus) word overlap. A strong floor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from peftrank.baselines.overlap import overlap
from peftrank.baselines.popularity import popularity
from peftrank.types import Slate


def popularity_overlap(
    slates: Sequence[Slate], *, train: Sequence[Slate], seed: int
) -> list[tuple[float, ...]]:
    """Returns log(1 + users) * (1 + overlap)."""
    counts = popularity(slates, train=train, seed=seed)
    shared = overlap(slates, train=train, seed=seed)
    return [
        tuple(math.log1p(c) * (1.0 + o) for c, o in zip(a, b, strict=True))
        for a, b in zip(counts, shared, strict=True)
    ]
