"""Training lists whose irrelevant candidates are drawn anew from the items of the training part.

Evenly, by popularity, or the ones that the current model scores highest, as a schedule over epochs
says: easy ones first (curriculum learning, Bengio et al., ICML 2009), then hard ones, found by a
model that is up to date (ANCE, Xiong et al. 2021, arXiv 2007.00808). It knows no model: the scores
of a pool are given by its caller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from peftrank._lists import Floats, Ints
from peftrank.config import Config, Negatives
from peftrank.errors import ConfigError, DataError
from peftrank.slates import draw_by_weight, draw_uniform, negatives
from peftrank.training.augment import generator
from peftrank.types import Item, Slate


@dataclass(frozen=True)
class Catalogue:
    """The items of the training part, and which user is known to have met which."""

    items: tuple[Item, ...]
    """In the order of their ids. Without features, which belong to a candidate of one slate."""
    met: Floats
    """(I,) how many users met each item."""
    known: Ints
    """Sorted `user * I + item` of what users met: their histories and relevant candidates."""
    users: Mapping[str, int]


def catalogue(slates: Sequence[Slate], fields: Sequence[str]) -> Catalogue:
    """Returns the catalogue of labelled slates.

    Args:
        slates: The training part. An item's fields are those of its first occurrence.
        fields: An item without text in any of them cannot be a candidate and is left out.
    """
    found: dict[str, Item] = {}
    users: dict[str, int] = {}
    for slate in slates:
        users.setdefault(slate.user_id, len(users))
        for item in (*slate.candidates, *slate.history):
            if item.item_id not in found and any(item.fields.get(name) for name in fields):
                found[item.item_id] = replace(item, features={})
    items = tuple(found[name] for name in sorted(found))
    place = {item.item_id: i for i, item in enumerate(items)}
    pairs = (
        users[slate.user_id] * len(items) + place[item.item_id]
        for slate in slates
        for item in (*slate.history, *_relevant(slate))
        if item.item_id in place
    )
    known = np.unique(np.fromiter(pairs, np.int64))
    met = np.bincount(known % max(1, len(items)), minlength=len(items))
    return Catalogue(items, met.astype(np.float64), known, users)


def stage(settings: Negatives, epoch: int) -> str:
    """Returns what an epoch (from 0) draws: `uniform`, `popularity` or `hard`."""
    return settings.schedule[min(epoch, len(settings.schedule) - 1)]


def drawn(
    slate: Slate, found: Catalogue, count: int, *, popular: bool, seed: int, epoch: int
) -> tuple[Item, ...]:
    """Returns distinct items that the slate's user is not known to have met, in random order.

    They are fewer than `count` only where there are no more. What the user meets in the validation
    part is not known here, as it would not be in production.

    Args:
        slate: Of the training part.
        found: Its catalogue.
        count: How many.
        popular: In proportion to the number of users that met an item (those that nobody met come
            after all others); else evenly.
        seed: Of the run.
        epoch: From 0.
    """
    if count == 0:
        return ()
    rng = generator(seed, epoch, "negatives", slate.slate_id)
    everything = np.arange(len(found.items))
    draw = draw_by_weight(everything, found.met, rng) if popular else draw_uniform(everything, rng)
    user = np.array([found.users[slate.user_id]])
    _, chosen, _ = negatives(user, count, found.known, len(found.items), draw, everything, rng)
    return tuple(found.items[i] for i in rng.permutation(chosen))


def hardest(
    pool: Sequence[Item], scores: Sequence[float], count: int, skip: float
) -> tuple[Item, ...]:
    """Returns the items of a pool that score highest, without the very highest.

    Among what a model scores highest are items that the user would like, and only nobody has shown
    (false negatives: RocketQA, Qu et al. 2021, arXiv 2010.08191).

    Args:
        pool: From `drawn`.
        scores: One per item. Equal ones go by id.
        count: How many.
        skip: The share of the pool, rounded down, that is left out at the top.
    """
    order = sorted(range(len(pool)), key=lambda i: (-scores[i], pool[i].item_id))
    first = int(skip * len(pool))
    return tuple(pool[i] for i in order[first : first + count])


def irrelevant(slate: Slate) -> int:
    """Returns how many candidates of a labelled slate are not relevant."""
    return len(slate.candidates) - len(_relevant(slate))


def redrawn(slate: Slate, items: Sequence[Item]) -> Slate:
    """Returns the slate with other irrelevant candidates, each in the place of one, of weight 1."""
    assert slate.labels is not None
    fresh = iter(items)
    return replace(
        slate,
        candidates=tuple(
            item if label > 0 else next(fresh)
            for item, label in zip(slate.candidates, slate.labels, strict=True)
        ),
        weights=slate.weights
        and tuple(
            weight if label > 0 else 1.0
            for weight, label in zip(slate.weights, slate.labels, strict=True)
        ),
    )


def check_negatives(config: Config, features: Sequence[str]) -> None:
    """Raises ConfigError if the configuration has what drawn candidates cannot have.

    Args:
        config: The run, with `training.negatives`.
        features: The candidate features that the readout reads.
    """
    training, key = config.training, "training.negatives"
    if features:
        raise ConfigError(
            f"{key} draws candidates whose features in a slate are not known, and a readout of "
            f"features ({', '.join(features)}) would learn which those are. Set data.features: "
            "[], or leave it out."
        )
    if config.loss.tasks:
        raise ConfigError(
            f"{key} draws candidates whose values for loss.tasks are not known. Use one or the "
            "other."
        )
    if training.bottom_cache != "off":
        raise ConfigError(
            f"training.bottom_cache={training.bottom_cache} keeps what is computed of a slate for "
            f"later epochs, and {key} changes the slates in every epoch. Use one or the other."
        )
    assert training.negatives is not None
    if "hard" in training.negatives.schedule and config.prompt.mode != "isolated":
        raise ConfigError(
            f"{key} finds hard candidates by their scores, which in prompt.mode: "
            f"{config.prompt.mode} depend on the rest of the list. Use prompt.mode: isolated, or "
            "a schedule of uniform and popularity."
        )


def check_catalogue(found: Catalogue, slates: Sequence[Slate], settings: Negatives) -> None:
    """Raises DataError if there are not enough items to draw from for every slate.

    Raises:
        ConfigError: the pool is too small for the longest list.
    """
    total, mining = len(found.items), "hard" in settings.schedule
    known = np.bincount(found.known // max(1, total), minlength=len(found.users))
    for slate in slates:
        count, there = irrelevant(slate), total - int(known[found.users[slate.user_id]])
        if there < count:
            raise DataError(
                f"slate {slate.slate_id!r}: training.negatives draws {count} candidates, and the "
                f"training part has {there} items that user {slate.user_id!r} is not known to "
                "have met. Leave it out, or shorten the lists."
            )
        pool = min(settings.pool, there)
        if mining and pool - int(settings.skip * pool) < count:
            raise ConfigError(
                f"slate {slate.slate_id!r} needs {count} hard candidates out of a pool of {pool} "
                f"without the first {int(settings.skip * pool)}. Raise training.negatives.pool "
                f"(now {settings.pool}) or lower training.negatives.skip ({settings.skip})."
            )


def _relevant(slate: Slate) -> list[Item]:
    labels = slate.labels or ()
    return [i for i, label in zip(slate.candidates, labels, strict=True) if label > 0]
