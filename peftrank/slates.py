"""Logs become slates: which interaction is predicted, in which part, against which candidates.

Works on codes (see `_lists.py`); texts, files and features are no concern of this file. Every
random choice comes from the generator it is given.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftrank._lists import Floats, Ints, Lists, Sequences
from peftrank.errors import ConfigError, DataError

SPLITS = ("leave-one-out", "time", "users", "given")
NEGATIVES = ("uniform", "popularity", "category")
_ROUNDS = 30
"""Tries to draw a negative at random before the allowed ones are listed."""


@dataclass(frozen=True)
class Targets:
    """The interactions to be predicted, and which interactions may be counted."""

    event: Ints
    """(S,) index of the event in the sequences."""
    part: Ints
    """(S,) index into PARTS."""
    training: np.ndarray
    """(E,) bool; True = belongs to the training part."""


def split(
    sequences: Sequences,
    how: str,
    *,
    valid: float | None = None,
    test: float | None = None,
    targets_per_user: int = 1,
    rng: np.random.Generator,
) -> Targets:
    """Returns what is predicted in each part.

    leave-one-out: a user's last interaction is a test target, the one before it a validation
    target. users: whole users are held out, their last interaction is the target. time: the
    newest interactions of the log are test targets, those before them validation targets. A
    target needs an interaction before it. Training targets are each user's latest ones.

    Args:
        sequences: What every user did.
        how: leave-one-out, time or users.
        valid: Below 1 a share of the users (time: of the interactions), else how many. Absent:
            all users for leave-one-out, a tenth otherwise.
        test: As `valid`.
        targets_per_user: Training targets of each user, at most.
        rng: Chooses the held-out users.

    Raises:
        ConfigError: the split is unknown, or leaves nothing to train on.
        DataError: `time`, and an interaction has no time.
    """
    makers = {"leave-one-out": _leave_one_out, "users": _users, "time": _time}
    if how not in makers:
        raise ConfigError(f"cannot split interactions by {how!r}. Known: {', '.join(makers)}.")
    part = makers[how](sequences, valid, test, rng)
    start, end = sequences.start[:-1], sequences.start[1:]
    user = np.repeat(np.arange(len(start)), end - start)
    position = np.arange(len(part)) - start[user]
    training = part == 0
    # Counted from the end of the user's training interactions: 1 = the latest.
    kept = np.bincount(user[training], minlength=len(start))
    from_end = kept[user] - position
    wanted = training & (from_end <= targets_per_user)
    if how == "users":
        wanted |= ~training & (np.arange(len(part)) == end[user] - 1)
    else:
        wanted |= ~training
    event = np.flatnonzero(wanted & (position > 0))
    # A user's slates are adjacent, the latest first: successive prompts share their beginning.
    event = event[np.lexsort((-position[event], user[event], part[event]))]
    if not training.any():
        raise ConfigError("the split leaves no interaction to train on; lower --valid and --test")
    return Targets(event, part[event], training)


def _leave_one_out(
    sequences: Sequences, valid: float | None, test: float | None, rng: np.random.Generator
) -> Ints:
    start, end = sequences.start[:-1], sequences.start[1:]
    part = np.zeros(len(sequences.item), np.int64)
    # Something must stay before the target, and one more to train on.
    long = np.flatnonzero(end - start >= 3)
    tested = _choose(long, 1.0 if test is None else test, rng, all_of_it=test is None)
    part[end[tested] - 1] = 2
    free = end - 1 - (part[np.maximum(end - 1, 0)] == 2)
    long = np.flatnonzero(free - start >= 1)
    chosen = _choose(long, 1.0 if valid is None else valid, rng, all_of_it=valid is None)
    # Where the last interaction is a test target, the one before it; else the last.
    part[free[chosen]] = 1
    return part


def _users(
    sequences: Sequences, valid: float | None, test: float | None, rng: np.random.Generator
) -> Ints:
    length = np.diff(sequences.start)
    able = np.flatnonzero(length >= 2)
    tested = _choose(able, 0.1 if test is None else test, rng)
    rest = np.setdiff1d(able, tested)
    checked = _choose(rest, 0.1 if valid is None else valid, rng)
    of_user = np.zeros(len(length), np.int64)
    of_user[tested], of_user[checked] = 2, 1
    return np.repeat(of_user, length)


def _time(
    sequences: Sequences, valid: float | None, test: float | None, rng: np.random.Generator
) -> Ints:
    return part_by_time(sequences.time, valid, test)


def part_by_time(time: Floats, valid: float | None, test: float | None) -> Ints:
    """Returns the part of each moment: the newest are test, those before them validation.

    Raises:
        DataError: a moment is unknown.
    """
    if np.isnan(time).any():
        count = int(np.isnan(time).sum())
        raise DataError(f"{count} rows have no time to be split by; use another --split")
    total = len(time)
    tested = _count(0.1 if test is None else test, total)
    checked = _count(0.1 if valid is None else valid, total)
    ordered = np.append(np.sort(time), np.inf)
    # Interactions of one moment stay together, in the later part.
    after = ordered[max(total - tested, 0)]
    between = ordered[max(total - tested - checked, 0)]
    return np.where(time >= after, 2, np.where(time >= between, 1, 0)).astype(np.int64)


def held_out(
    groups: Sequence[str], valid: float | None, test: float | None, rng: np.random.Generator
) -> dict[str, int]:
    """Returns the part of each group (a user of shown lists); each group lies in one part."""
    names = np.array(sorted(set(groups)))
    codes = np.arange(len(names))
    tested = _choose(codes, 0.1 if test is None else test, rng)
    checked = _choose(np.setdiff1d(codes, tested), 0.1 if valid is None else valid, rng)
    part = np.zeros(len(names), np.int64)
    part[tested], part[checked] = 2, 1
    return {str(name): int(value) for name, value in zip(names, part, strict=True)}


def _count(amount: float, total: int) -> int:
    if amount < 0:
        raise ConfigError(f"--valid and --test take a share below 1 or a count, not {amount}")
    return round(amount * total) if amount < 1 else int(amount)


def _choose(
    codes: Ints, amount: float, rng: np.random.Generator, *, all_of_it: bool = False
) -> Ints:
    count = len(codes) if all_of_it else _count(amount, len(codes))
    if count > len(codes):
        raise ConfigError(f"cannot hold out {count} users: only {len(codes)} are long enough")
    return np.sort(rng.permutation(codes)[:count])


Draw = Callable[[Ints], Ints]
"""Slate indices, one per negative wanted -> an item for each."""


def draw_uniform(pool: Ints, rng: np.random.Generator) -> Draw:
    """Returns a draw of items of the pool, each equally likely."""
    return lambda slates: pool[rng.integers(len(pool), size=len(slates))]


def draw_by_weight(pool: Ints, weight: Floats, rng: np.random.Generator) -> Draw:
    """Returns a draw in proportion to `weight`, one per item of the pool."""
    total = np.cumsum(weight)
    if not len(total) or total[-1] <= 0:
        raise DataError("no item has a count in the training part, so none can be drawn by it")

    def draw(slates: Ints) -> Ints:
        place = np.searchsorted(total, rng.random(len(slates)) * total[-1], side="right")
        return np.asarray(pool[np.minimum(place, len(pool) - 1)])

    return draw


def draw_same_group(pool: Ints, group: Ints, target: Ints, rng: np.random.Generator) -> Draw:
    """Returns a draw from the items of the target's group.

    Args:
        pool: Items that may be drawn.
        group: (I,) the category of each item, -1 = none (drawn from the whole pool).
        target: (S,) the positive of each slate.
        rng: The generator.
    """
    order = pool[np.argsort(group[pool], kind="stable")]
    low = np.searchsorted(group[order], group[target], side="left")
    high = np.searchsorted(group[order], group[target], side="right")
    low = np.where(group[target] < 0, 0, low)
    high = np.where(group[target] < 0, len(order), high)

    def draw(slates: Ints) -> Ints:
        width = np.maximum(high[slates] - low[slates], 1)
        place = low[slates] + (rng.random(len(slates)) * width).astype(np.int64)
        return np.asarray(order[np.minimum(place, len(order) - 1)])

    return draw


def negatives(
    user: Ints,
    count: int,
    known: Ints,
    items: int,
    draw: Draw,
    fallback: Ints,
    rng: np.random.Generator,
) -> tuple[Ints, Ints, int]:
    """Returns distinct items per slate that the user is not known to have met.

    Args:
        user: (S,) user of each slate.
        count: Negatives of each slate.
        known: Sorted `user * items + item` of everything any user is known to have met.
        items: How many items there are.
        draw: Proposes items; rejected ones are drawn again.
        fallback: Items that may be taken where the draw has no more to offer.
        rng: Chooses among them.

    Returns:
        slate (index) and item of every negative, sorted by slate, and how many of them came from
        the fallback. A slate has fewer than `count` only where the items run out.
    """
    slate = np.repeat(np.arange(len(user)), count)
    taken = np.zeros(0, np.int64)
    for _ in range(_ROUNDS):
        if not len(slate):
            break
        key = slate * items + draw(slate)
        fresh = ~_contains(known, user[slate] * items + key % items) & ~_contains(taken, key)
        _, first = np.unique(key, return_index=True)
        once = np.zeros(len(key), bool)
        once[first] = True
        accepted = fresh & once
        taken = np.union1d(taken, key[accepted])
        slate = slate[~accepted]
    filled = 0
    extra = []
    for index, missing in sorted(Counter(slate.tolist()).items()):
        low, high = np.searchsorted(taken, (index * items, (index + 1) * items))
        barred = np.concatenate((taken[low:high] % items, _of_user(known, int(user[index]), items)))
        allowed = np.setdiff1d(fallback, barred)
        step = rng.permutation(len(allowed))[:missing]
        extra.append(index * items + allowed[step])
        filled += len(step)
    taken = np.sort(np.concatenate((taken, *extra)))
    return taken // items, taken % items, filled


def _of_user(known: Ints, user: int, items: int) -> Ints:
    low, high = np.searchsorted(known, (user * items, (user + 1) * items))
    return known[low:high] % items


def _contains(values: Ints, key: Ints) -> np.ndarray:
    if not len(values):
        return np.zeros(len(key), bool)
    place = np.minimum(np.searchsorted(values, key), len(values) - 1)
    return np.asarray(values[place] == key)


def from_targets(
    sequences: Sequences,
    targets: Targets,
    user_ids: Sequence[str],
    chosen: tuple[Ints, Ints],
    *,
    history_length: int,
    labels: str,
    rng: np.random.Generator,
) -> Lists:
    """Returns one list per target: the target and its negatives, shuffled.

    Args:
        sequences: What every user did.
        targets: What is predicted.
        user_ids: Name of each user.
        chosen: (slate, item) of every negative, sorted by slate.
        history_length: The newest interactions kept, at most.
        labels: binary (target 1) or rating (target's own value); negatives are 0.
        rng: Shuffles the candidates.
    """
    event = targets.event
    user = np.searchsorted(sequences.start, event, side="right") - 1
    first = np.maximum(sequences.start[user], event - history_length)
    rows = np.concatenate([np.zeros(0, np.int64), *map(np.arange, first, event)])
    slate = np.concatenate((np.arange(len(event)), chosen[0]))
    item = np.concatenate((sequences.item[event], chosen[1]))
    gain = sequences.value[event] if labels == "rating" else np.ones(len(event))
    label = np.concatenate((gain, np.zeros(len(chosen[0]))))
    order = np.lexsort((rng.random(len(slate)), slate))
    names = (f"{user_ids[u]}-{e - sequences.start[u]}" for u, e in zip(user, event, strict=True))
    return Lists(
        slate_ids=tuple(names),
        user=user.astype(np.int64),
        part=targets.part,
        time=sequences.time[event],
        history_start=_starts(event - first),
        history=sequences.item[rows],
        feedback=sequences.value[rows],
        candidate_start=_starts(np.bincount(slate, minlength=len(event))),
        candidate=item[order],
        label=label[order],
    )


def select(lists: Lists, keep: Ints) -> Lists:
    """Returns the slates at the given positions, in that order."""
    history = _rows(lists.history_start, keep)
    rows = _rows(lists.candidate_start, keep)
    return Lists(
        slate_ids=tuple(lists.slate_ids[i] for i in keep),
        user=lists.user[keep],
        part=lists.part[keep],
        time=lists.time[keep],
        history_start=_starts(np.diff(lists.history_start)[keep]),
        history=lists.history[history],
        feedback=lists.feedback[history],
        candidate_start=_starts(np.diff(lists.candidate_start)[keep]),
        candidate=lists.candidate[rows],
        label=lists.label[rows],
    )


def limit(lists: Lists, max_slates: int, rng: np.random.Generator) -> Ints:
    """Returns positions with at most `max_slates` of the training part: users at random, whole."""
    rows = np.flatnonzero(lists.part == 0)
    users, code = np.unique(lists.user[rows], return_inverse=True)
    turn = rng.permutation(len(users))
    kept = np.sort(rows[np.lexsort((rows, turn[code]))][:max_slates])
    return np.concatenate((kept, np.flatnonzero(lists.part != 0)))


def from_run(
    ranked: Mapping[str, Sequence[int]],
    names: Sequence[tuple[str, str]],
    user: Ints,
    count: int,
    known: Ints,
    items: int,
) -> tuple[Ints, Ints]:
    """Returns (slate, item) of the best retrieved items the user is not known to have met.

    Args:
        ranked: Items by the name of a slate or of a user, best first.
        names: (slate id, user id) of each slate.
        user: (S,) user of each slate.
        count: Negatives of each slate, at most.
        known: Sorted `user * items + item` of everything any user is known to have met.
        items: How many items there are.

    Raises:
        DataError: a slate is named by neither.
    """
    slate, item = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index, (slate_id, user_id) in enumerate(names):
        row = ranked.get(slate_id, ranked.get(user_id))
        if row is None:
            raise DataError(
                f"the run has no candidates for slate {slate_id!r} and none for user {user_id!r}"
            )
        codes = np.array(row, np.int64)
        fresh = codes[~_contains(known, user[index] * items + codes)][:count]
        slate.append(np.full(len(fresh), index))
        item.append(fresh)
    return np.concatenate(slate), np.concatenate(item)


def _rows(start: Ints, keep: Ints) -> Ints:
    ranges = map(np.arange, start[keep], start[keep + 1])
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def _starts(length: Ints) -> Ints:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)))
