"""What a run minimises: losses by name, their options, and what they need beside scores and labels.

It knows no model: the scores of the frozen reference are computed by its caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftrank import plugins
from peftrank.config import Config, LossConfig, Propensity, TaskLoss
from peftrank.errors import ConfigError, DataError
from peftrank.model import Entering
from peftrank.readouts.multi_task import RANK
from peftrank.types import Batch, Slate


@dataclass(frozen=True)
class Loss:
    """A loss with its options and what else it takes."""

    name: str
    function: Any
    options: Mapping[str, Any]
    weight: float
    takes_weights: bool
    takes_reference: bool
    """Whether it compares with the scores of a frozen reference."""


@dataclass(frozen=True)
class Objective:
    """The loss of the ranking and those of the tasks beside it. A call gives a value per slate."""

    ranking: Loss
    tasks: Mapping[str, Loss]
    """In the order of `Batch.tasks`."""

    def __call__(
        self,
        scores: Mapping[str, Tensor],
        batch: Batch,
        reference: Tensor | None = None,
        log_variance: Tensor | None = None,
    ) -> Tensor:
        """Returns the losses (S,), summed over the ranking and the tasks.

        A task's loss sees the candidates whose value is known; a slate without any does not count
        for the task. The weights of a slate belong to its labels, so tasks do not read them.

        Args:
            scores: (S, N) of each head, by task; `rank` is the ranking's.
            batch: Holds labels, weights, tasks and mask.
            reference: (S, N), of the frozen reference, where the ranking's loss takes it.
            log_variance: (1 + K,) in the order of `scores`. A loss L then counts as
                exp(-s) L + s / 2 (arXiv 1705.07115, with the 1/2 of regressions left to `weight`).
        """
        total = torch.zeros_like(batch.mask[:, 0], dtype=torch.float32)
        for index, (name, given) in enumerate(scores.items()):
            if name == RANK:
                loss, more = self.ranking, {"weights": batch.weights, "reference": reference}
                labels, known = batch.labels, batch.mask
            else:
                loss, more = self.tasks[name], {}
                assert batch.tasks is not None  # packed for these tasks
                labels = batch.tasks[..., list(self.tasks).index(name)]
                known = batch.mask & ~labels.isnan()
                labels = labels.nan_to_num()
            taken = {key: value for key, value in more.items() if value is not None}
            value = loss.function(given, labels, known, **taken, **loss.options)
            if log_variance is not None:
                value = torch.exp(-log_variance[index]) * value + log_variance[index] / 2
            total = total + loss.weight * value.masked_fill(~known.any(dim=-1), 0.0)
        return total


def objective(config: Config) -> Objective:
    """Returns the configured objective.

    Raises:
        ConfigError: no such loss, or a task's loss compares with a reference.
    """
    tasks = {name: _loss(given) for name, given in (config.loss.tasks or {}).items()}
    for name, loss in tasks.items():
        if loss.takes_reference:
            raise ConfigError(
                f"loss.tasks.{name} is {loss.name!r}, which compares with a frozen reference; "
                "that is for the ranking alone"
            )
    return Objective(_loss(config.loss), tasks)


def _loss(given: LossConfig | TaskLoss) -> Loss:
    function = plugins.load("losses", given.name)
    parameters = inspect.signature(function).parameters
    return Loss(
        given.name,
        function,
        given.options,
        given.weight,
        takes_weights="weights" in parameters,
        takes_reference="reference" in parameters,
    )


def head_scores(
    model: Any,  # noqa: ANN401
    made: Objective,
    batch: Batch,
    entering: Entering | None = None,
) -> Mapping[str, Tensor]:
    """Returns the scores (S, N) of every head of a RankingModel, by task."""
    if made.tasks:
        scores: dict[str, Tensor] = model.by_task(batch, entering)
        return scores
    return {RANK: model(batch, entering)}


def check_tasks(made: Objective, readout: nn.Module, found: Mapping[str, bool]) -> None:
    """Raises ConfigError unless every head has a loss and every task some values to learn.

    Args:
        made: The objective.
        readout: Its heads are named by task.
        found: The tasks of the training slates, and whether any value of each is known.
    """
    # Only a readout of several heads has tasks.
    heads = tuple(getattr(readout, "tasks", ()))
    if set(heads) != set(made.tasks):
        raise ConfigError(
            f"readout.tasks has {', '.join(heads) or 'none'} and loss.tasks "
            f"{', '.join(made.tasks) or 'none'}; name the same tasks in both (readout multi_task)"
        )
    for name in heads:
        if not found.get(name, False):
            known = sorted(found)
            raise ConfigError(
                f"no training slate has a value of the task {name!r}"
                f"{plugins.did_you_mean(name, known)}. There are: {', '.join(known) or 'none'}."
            )


def check_weights(made: Objective, weighted: Slate | None) -> None:
    """Raises ConfigError if slates have weights (`weighted` is one) that the loss cannot use."""
    if weighted is not None and not made.ranking.takes_weights:
        raise ConfigError(
            f"slate {weighted.slate_id!r} has weights, and the loss {made.ranking.name!r} has no "
            "parameter `weights` to use them. Choose another loss, or leave weights and "
            "loss.propensity out."
        )


def with_propensity(slate: Slate, given: Propensity) -> Slate:
    """Returns a slate whose clicks weigh 1 / (the chance that their position was looked at).

    A candidate with a label above 0 is a click; the others keep the weight 1. Joachims et al.,
    Unbiased Learning-to-Rank with Biased Feedback, WSDM 2017, with weights cut at
    `largest_weight`.

    Raises:
        DataError: the slate has weights of its own, or a position is missing or no place of a list.
    """
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
