"""Chance: a random order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from peftrank.types import Slate


def random(
    slates: Sequence[Slate], *, train: Sequence[Slate], seed: int
) -> list[tuple[float, ...]]:
    """Returns uniform random scores."""
    generator = np.random.default_rng(seed)
    return [tuple(generator.random(len(slate.candidates)).tolist()) for slate in slates]
