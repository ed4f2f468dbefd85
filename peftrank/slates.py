"""Logs become slates: which interaction is predicted, in which part, against which candidates.

Works on codes (see `_lists.py`); texts, files and features are no concern of this file. Every
random choice comes from the generator it is given.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from peftrank._chunks import ranges
from peftrank._lists import Codes, Floats, Ints, Lists, Sequences
from peftrank.errors import ConfigError, DataError

SPLITS = ("leave-one-out", "time", "users", "given")
NEGATIVES = ("uniform", "popularity", "category")
_ROUNDS = 30
"""Tries to draw a negative at random before the allowed ones are listed."""
BLOCK = 1_000_000
"""Candidates in memory at once, while they are drawn or laid out."""
_NONE = np.iinfo(np.int32).max


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
) -> tuple[Ints, Codes, int]:
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
        Where the negatives of each slate begin, (S+1,); the items, sorted in each slate; and how
        many of them came from the fallback. A slate has fewer than `count` only where the items
        run out.
    """
    table = np.full((len(user), count), _NONE, np.int32)
    step = max(1, BLOCK // count)
    size = np.zeros(len(user), np.int64)
    for _ in range(_ROUNDS):
        short = np.flatnonzero(size < count)
        if not len(short):
            break
        # In blocks: proposals are 60 bytes each while they are looked at.
        for slates in np.split(short, range(step, len(short), step)):
            wanted = np.repeat(slates, count - size[slates])
            key = np.sort(wanted * items + draw(wanted))
            key = key[np.diff(key, prepend=-1) > 0]
            slate, item = key // items, key % items
            met = _between(known, user[slates].min() * items, (user[slates].max() + 1) * items)
            fresh = ~_contains(met, user[slate] * items + item)
            if size[slates].any():
                fresh &= ~(table[slate] == item[:, None]).any(axis=1)
            slate, item = slate[fresh], item[fresh]
            place = size[slate] + np.arange(len(slate)) - np.searchsorted(slate, slate)
            table[slate, place] = item
            size[slates] += np.bincount(np.searchsorted(slates, slate), minlength=len(slates))
    filled = 0
    for index in np.flatnonzero(size < count).tolist():
        barred = (table[index, : size[index]], _of_user(known, int(user[index]), items))
        allowed = np.setdiff1d(fallback, np.concatenate(barred))
        extra = allowed[rng.permutation(len(allowed))[: count - size[index]]]
        table[index, size[index] : size[index] + len(extra)] = extra
        size[index] += len(extra)
        filled += len(extra)
    table.sort(axis=1)
    full = size.min(initial=count) == count
    return _starts(size), table.ravel() if full else table[table < _NONE], filled


def _between(values: Ints, low: int, high: int) -> Ints:
    first, last = np.searchsorted(values, (low, high))
    return values[first:last]


def _of_user(known: Ints, user: int, items: int) -> Ints:
    return _between(known, user * items, (user + 1) * items) % items


def _contains(values: Ints, key: Ints) -> np.ndarray:
    if not len(values):
        return np.zeros(len(key), bool)
    place = np.minimum(np.searchsorted(values, key), len(values) - 1)
    return np.asarray(values[place] == key)


def from_targets(
    sequences: Sequences,
    targets: Targets,
    user_ids: Sequence[str],
    chosen: tuple[Ints, Codes],
    *,
    history_length: int,
    labels: str,
    rng: np.random.Generator,
) -> Iterator[Lists]:
    """Yields one list per target, in blocks: the target and its negatives, shuffled.

    The lists do not depend on the size of the blocks.

    Args:
        sequences: What every user did.
        targets: What is predicted.
        user_ids: Name of each user.
        chosen: Where the negatives of each slate begin, and their items; see `negatives`.
        history_length: The newest interactions kept, at most.
        labels: binary (target 1) or rating (target's own value); negatives are 0.
        rng: Shuffles the candidates.
    """
    total = len(targets.event)
    # Targets take the first numbers and negatives those after: one sequence, read at two places.
    of_targets, of_negatives = copy.deepcopy(rng), copy.deepcopy(rng)
    of_negatives.bit_generator.advance(total)  # type: ignore[attr-defined]
    width = 1 + max(1, int(np.diff(chosen[0]).max(initial=0)))
    for block in range(0, max(1, total), max(1, BLOCK // width)):
        rows = slice(block, min(block + max(1, BLOCK // width), total))
        event = targets.event[rows]
        user = np.searchsorted(sequences.start, event, side="right") - 1
        first = np.maximum(sequences.start[user], event - history_length)
        past = ranges(first, event - first)
        begin = chosen[0][rows.start : rows.stop + 1]
        negative = chosen[1][begin[0] : begin[-1]]
        own = np.arange(len(event))
        slate = np.concatenate((own, np.repeat(own, np.diff(begin))))
        gain = sequences.value[event] if labels == "rating" else np.ones(len(event))
        label = np.concatenate((gain.astype(np.float64), np.zeros(len(negative))))
        turn = np.concatenate((of_targets.random(len(event)), of_negatives.random(len(negative))))
        order = np.lexsort((turn, slate))
        names = (
            f"{user_ids[u]}-{e - sequences.start[u]}" for u, e in zip(user, event, strict=True)
        )
        yield Lists(
            slate_ids=tuple(names),
            user=user.astype(np.int64),
            part=targets.part[rows],
            time=sequences.time[event],
            history_start=_starts(event - first),
            history=sequences.item[past].astype(np.int64),
            feedback=sequences.value[past].astype(np.float64),
            candidate_start=_starts(np.diff(begin) + 1),
            candidate=np.concatenate((sequences.item[event], negative))[order].astype(np.int64),
            label=label[order],
        )


def select(lists: Lists, keep: Ints) -> Lists:
    """Returns the slates at the given positions, in that order."""
    history = ranges(lists.history_start[keep], np.diff(lists.history_start)[keep])
    rows = ranges(lists.candidate_start[keep], np.diff(lists.candidate_start)[keep])
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


def join(parts: Sequence[Lists]) -> Lists:
    """Returns the slates of several tables, one table's after the other's."""

    def end_to_end(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    return Lists(
        slate_ids=tuple(slate_id for part in parts for slate_id in part.slate_ids),
        user=end_to_end("user"),
        part=end_to_end("part"),
        time=end_to_end("time"),
        history_start=_starts(np.concatenate([np.diff(part.history_start) for part in parts])),
        history=end_to_end("history"),
        feedback=end_to_end("feedback"),
        candidate_start=_starts(np.concatenate([np.diff(part.candidate_start) for part in parts])),
        candidate=end_to_end("candidate"),
        label=end_to_end("label"),
    )


def limit(part: Ints, user: Ints, max_slates: int, rng: np.random.Generator) -> Ints:
    """Returns positions of slates, at most `max_slates` in the training part: whole users.

    Which ones is chosen at random; slates of the other parts all stay.
    """
    rows = np.flatnonzero(part == 0)
    users, code = np.unique(user[rows], return_inverse=True)
    turn = rng.permutation(len(users))
    kept = np.sort(rows[np.lexsort((rows, turn[code]))][:max_slates])
    return np.concatenate((kept, np.flatnonzero(part != 0)))


def from_run(
    ranked: Mapping[str, Sequence[int]],
    names: Sequence[tuple[str, str]],
    user: Ints,
    count: int,
    known: Ints,
    items: int,
) -> tuple[Ints, Codes]:
    """Returns where each slate's negatives begin, and the items: the best the user has not met.

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
    length, item = [], [np.zeros(0, np.int32)]
    for index, (slate_id, user_id) in enumerate(names):
        row = ranked.get(slate_id, ranked.get(user_id))
        if row is None:
            raise DataError(
                f"the run has no candidates for slate {slate_id!r} and none for user {user_id!r}"
            )
        codes = np.array(row, np.int64)
        fresh = codes[~_contains(known, user[index] * items + codes)][:count]
        length.append(len(fresh))
        item.append(fresh.astype(np.int32))
    return _starts(np.array(length, np.int64)), np.concatenate(item)


def _starts(length: Ints) -> Ints:
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(length, dtype=np.int64)))
