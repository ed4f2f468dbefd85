"""LambdaMART (LightGBM) on the candidate features alone: what numbers are worth without text."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from peftrank.errors import ConfigError
from peftrank.types import Slate

_LABEL_STEPS = 2  # LightGBM takes integer grades; half stars become whole ones


def lambdamart(
    slates: Sequence[Slate], *, train: Sequence[Slate], seed: int
) -> list[tuple[float, ...]]:
    """Returns the scores of 300 boosted trees fitted to the training slates' features.

    Raises:
        ConfigError: lightgbm is not installed, or the slates carry no features.
    """
    try:
        lightgbm = importlib.import_module("lightgbm")
    except ModuleNotFoundError:
        raise ConfigError(
            "baseline lambdamart needs the package lightgbm: pip install 'peftrank[baselines]'"
        ) from None
    names = sorted({n for s in train for item in s.candidates for n in item.features})
    if not names:
        raise ConfigError(
            "baseline lambdamart needs candidate features; make slates that have some with: "
            "peftrank data prepare --features popularity,item_knn,text_overlap,recency"
        )
    ranker = lightgbm.LGBMRanker(
        n_estimators=300,
        learning_rate=0.05,
        num_leaves=31,
        min_child_samples=50,
        random_state=seed,
        deterministic=True,
        force_row_wise=True,
        verbose=-1,
    )
    labels = [round(label * _LABEL_STEPS) for s in train for label in s.labels or ()]
    gains = (np.arange(max(labels) + 1) / _LABEL_STEPS).tolist()
    ranker.set_params(label_gain=gains)
    ranker.fit(_rows(train, names), labels, group=[len(s.candidates) for s in train])
    found = ranker.predict(_rows(slates, names))
    ends = np.cumsum([len(s.candidates) for s in slates])[:-1]
    return [tuple(part.tolist()) for part in np.split(found, ends)]


def _rows(slates: Sequence[Slate], names: Sequence[str]) -> NDArray[np.float64]:
    missing = float("nan")
    return np.array(
        [[c.features.get(n, missing) for n in names] for s in slates for c in s.candidates]
    )
