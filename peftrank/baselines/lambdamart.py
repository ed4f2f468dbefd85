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
        ConfigError: lightgbm is not installed, or the training slates carry no features or no
            labels.
    """
    try:
        lightgbm = importlib.import_module("lightgbm")
    except ModuleNotFoundError:
        raise ConfigError(
            "baseline lambdamart needs the package lightgbm: pip install 'peftrank[baselines]'"
        ) from None
    labelled = [s for s in train if s.labels is not None]
    if not labelled:
        raise ConfigError("baseline lambdamart learns from labels and no training slate has any")
    names = sorted({n for s in labelled for item in s.candidates for n in item.features})
    if not names:
        raise ConfigError(
            "baseline lambdamart needs candidate features; make slates that have some with: "
            "peftrank data prepare --features popularity,item_knn,text_overlap,recency"
        )
    labels = [round(label * _LABEL_STEPS) for s in labelled for label in s.labels or ()]
    rows = lightgbm.Dataset(
        _rows(labelled, names), label=labels, group=[len(s.candidates) for s in labelled]
    )
    # LightGBM's own API: its scikit-learn one needs another package.
    trees = lightgbm.train(
        {
            "objective": "lambdarank",
            "learning_rate": 0.05,
            "num_leaves": 31,
            "min_data_in_leaf": 50,
            "label_gain": (np.arange(max(labels) + 1) / _LABEL_STEPS).tolist(),
            "seed": seed,
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        },
        rows,
        num_boost_round=300,
    )
    found = trees.predict(_rows(slates, names))
    ends = np.cumsum([len(s.candidates) for s in slates])[:-1]
    return [tuple(part.tolist()) for part in np.split(found, ends)]


def _rows(slates: Sequence[Slate], names: Sequence[str]) -> NDArray[np.float64]:
    missing = float("nan")
    return np.array(
        [[c.features.get(n, missing) for n in names] for s in slates for c in s.candidates]
    )
