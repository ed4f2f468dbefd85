"""What a run minimises: a loss by name, its options, and what it needs beside scores and labels.

It knows no model: the scores of the frozen reference are computed by its caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from peftrank import plugins
from peftrank.config import Config, Propensity
from peftrank.errors import ConfigError, DataError
from peftrank.types import Batch, Slate


@dataclass(frozen=True)
class Objective:
    """A loss with its options. Calling it gives one value per slate."""

    name: str
    function: Any
    options: Mapping[str, Any]
    takes_weights: bool
    takes_reference: bool
    """Whether it compares with the scores of a frozen reference."""

    def __call__(self, scores: Tensor, batch: Batch, reference: Tensor | None = None) -> Tensor:
        """Returns the losses (S,) of scores (S, N).

        Args:
            scores: Of the model.
            batch: Holds labels, mask and weights.
            reference: (S, N), of the frozen reference, where the loss takes it.
        """
        more: dict[str, Tensor] = {}
        if batch.weights is not None:
            more["weights"] = batch.weights
        if reference is not None:
            more["reference"] = reference
        losses: Tensor = self.function(scores, batch.labels, batch.mask, **more, **self.options)
        return losses


def objective(config: Config) -> Objective:
    """Returns the configured objective.

    Raises:
        ConfigError: no such loss.
    """
    name = config.loss.name
    function = plugins.load("losses", name)
    parameters = inspect.signature(function).parameters
    return Objective(
        name,
        function,
        config.loss.options,
        takes_weights="weights" in parameters,
        takes_reference="reference" in parameters,
    )


def check_weights(made: Objective, slates: Sequence[Slate]) -> None:
    """Raises ConfigError if slates have weights that the loss cannot use."""
    weighted = next((slate for slate in slates if slate.weights is not None), None)
    if weighted is not None and not made.takes_weights:
        raise ConfigError(
            f"slate {weighted.slate_id!r} has weights, and the loss {made.name!r} has no parameter "
            "`weights` to use them. Choose another loss, or leave weights and loss.propensity out."
        )


def with_propensities(slates: Sequence[Slate], given: Propensity) -> list[Slate]:
    """Returns slates whose clicks weigh 1 / (the chance that their position was looked at).

    A candidate with a label above 0 is a click; the others keep the weight 1. Joachims et al.,
    Unbiased Learning-to-Rank with Biased Feedback, WSDM 2017, with weights cut at
    `largest_weight`.

    Raises:
        DataError: a slate has weights of its own, or a position is missing or no place of a list.
    """
    return [_with_propensities(slate, given) for slate in slates]


def _with_propensities(slate: Slate, given: Propensity) -> Slate:
    if slate.weights is not None:
        raise DataError(
            f"slate {slate.slate_id!r} has weights of its own, and loss.propensity is to set "
            "them. Leave one of the two out."
        )
    labels = slate.labels or (0.0,) * len(slate.candidates)
    weights = tuple(
        min(1.0 / _examined(_position(slate, index, given), given), given.largest_weight)
        if label > 0
        else 1.0
        for index, label in enumerate(labels)
    )
    return replace(slate, weights=weights)


def _position(slate: Slate, index: int, given: Propensity) -> int:
    """Returns the 1-based position that a candidate was shown at."""
    if given.position is None:
        return index + 1
    item = slate.candidates[index]
    value = item.features.get(given.position)
    if value is None or value < 1 or value != int(value):
        raise DataError(
            f"slate {slate.slate_id!r}: candidate {item.item_id!r} was clicked, and its feature "
            f"{given.position!r} (loss.propensity.position) is {value}; expected the position it "
            "was shown at: 1, 2, ..."
        )
    return int(value)


def _examined(position: int, given: Propensity) -> float:
    """Returns the chance that a position was looked at."""
    if given.examination is not None:
        return given.examination[min(position, len(given.examination)) - 1]
    assert given.power is not None  # one of the two is given
    return float(max(position**-given.power, 1e-9))
