"""How a training slate differs from epoch to epoch: another order, and fields that are left out.

Everything is drawn from the seed, the epoch and ids, so that every process and a resumed run see
the same. Slates of evaluations never come here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from peftrank.config import Config
from peftrank.errors import ConfigError
from peftrank.plugins import did_you_mean
from peftrank.types import Item, Slate


def generator(*parts: object) -> np.random.Generator:
    """Returns a random generator that only the parts decide (numbers and texts)."""
    return np.random.default_rng(np.frombuffer(_digest(*parts), np.uint32))


def shuffled(slate: Slate, *, seed: int, epoch: int) -> Slate:
    """Returns the slate with its candidates, and all that belongs to them, in another order."""
    order = generator(seed, epoch, "order", slate.slate_id).permutation(len(slate.candidates))

    def put(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[i] for i in order)

    return replace(
        slate,
        candidates=put(slate.candidates),
        labels=None if slate.labels is None else put(slate.labels),
        weights=None if slate.weights is None else put(slate.weights),
        tasks={name: put(values) for name, values in slate.tasks.items()},
    )


def with_fields_dropped(
    slate: Slate,
    probabilities: Mapping[str, float],
    kept: Collection[str],
    *,
    seed: int,
    epoch: int,
) -> Slate:
    """Returns the slate with fields of some items left out, as if they were not known.

    It learns what to do with an item that is new (the idea of DropoutNet, Volkovs et al., NeurIPS
    2017, for texts). What is drawn belongs to the user and the item: for an epoch an item lacks a
    field in all of a user's slates, which therefore still share their history in a row.

    Args:
        slate: Of the training part.
        probabilities: By field, how likely it is left out of an item.
        kept: Other fields. An item without text in any of them loses nothing.
        seed: Of the run.
        epoch: From 0.
    """

    def drop(item: Item) -> Item:
        if not any(item.fields.get(name) for name in kept):
            return item
        gone = {
            name
            for name, probability in probabilities.items()
            if _chance(seed, epoch, name, slate.user_id, item.item_id) < probability
        }
        return replace(item, fields={k: v for k, v in item.fields.items() if k not in gone})

    return replace(
        slate,
        history=tuple(map(drop, slate.history)),
        candidates=tuple(map(drop, slate.candidates)),
    )


def check_augmentation(config: Config, candidate_fields: Collection[str]) -> None:
    """Raises ConfigError for what would change nothing, or leave an item without text.

    Args:
        config: The run.
        candidate_fields: The item fields that the candidate part of the template uses.
    """
    training, prompt = config.training, config.prompt
    if training.shuffle_candidates and prompt.mode != "joint":
        raise ConfigError(
            "training.shuffle_candidates is for prompt.mode: joint. In mode "
            f"{prompt.mode} the order of candidates cannot matter; leave it out."
        )
    for name in training.field_dropout:
        if name not in prompt.fields:
            raise ConfigError(
                f"training.field_dropout names {name!r}{did_you_mean(name, prompt.fields)}, which "
                f"the prompt does not read. prompt.fields are: {', '.join(prompt.fields)}."
            )
    if training.field_dropout and not set(candidate_fields) - set(training.field_dropout):
        raise ConfigError(
            "training.field_dropout names all fields of the prompt's candidate part "
            f"({', '.join(sorted(candidate_fields))}). Leave one out of it, for items to be told "
            "by when the others are gone."
        )
    if (training.shuffle_candidates or training.field_dropout) and training.bottom_cache != "off":
        raise ConfigError(
            f"training.bottom_cache={training.bottom_cache} keeps what is computed of a slate for "
            "later epochs, and training.shuffle_candidates and training.field_dropout change the "
            "slates in every epoch. Use one or the other."
        )


def _chance(*parts: object) -> float:
    return int.from_bytes(_digest(*parts)[:8], "big") / 2**64


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
