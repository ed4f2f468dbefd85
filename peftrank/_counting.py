"""Exact counts over the training part: of items, and of pairs of items in one user's sequence.

Two rules decide what a slate may see. As of time: only events strictly before the slate. As of
part: the whole training part except the slate's own user. All counts are integers (weights are in
units of 1/1024), because removing a user from float sums leaves a residue that tells a target
nobody else ever chose from an item nobody chose.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftrank._lists import Codes, Floats, Ints, Sequences

UNIT = 1024
"""Fixed-point weights: 1024 is one."""
WINDOW = 50
"""Items of one sequence further apart than this are no pair, so long sequences stay linear."""

_BLOCK = 1_000_000
"""Events looked at at once, where each makes several numbers."""
WANTED_BITS = 26
"""Two to this power bytes tell most pairs that nobody asks for."""


class EventCounts:
    """Counts of events by key, at any time."""

    def __init__(
        self, key: Ints | Codes, rank: Ints | Codes, weights: tuple[np.ndarray, ...] = ()
    ) -> None:
        """Sorts the events once.

        Args:
            key: (E,) what is counted, at least 0.
            rank: (E,) time of the event as a rank >= 0.
            weights: further columns of integers that are summed, (E,) each.
        """
        order = np.lexsort((rank, key))
        key = key[order]
        self._start = np.append(np.flatnonzero(np.diff(key, prepend=-1)), len(key))
        self.keys = key[self._start[:-1]].astype(np.int64)
        self._ranks = int(rank.max(initial=0)) + 2
        position = np.repeat(np.arange(len(self.keys)), np.diff(self._start))
        position *= self._ranks
        position += rank[order]
        self._composite = position
        del key
        self._sums = [np.zeros(len(order) + 1, np.int64) for _ in weights]
        for total, weight in zip(self._sums, weights, strict=True):
            np.cumsum(weight[order], out=total[1:])

    def before(self, key: Ints, rank: Ints) -> list[Ints]:
        """Returns the count, then the sum of each weight, of events with a smaller rank."""
        low, high = self._range(key, rank)
        return [high - low, *(total[high] - total[low] for total in self._sums)]

    def first(self, key: Ints, rank: Ints) -> Ints:
        """Returns the rank of the first event before `rank`, -1 if there is none."""
        low, high = self._range(key, rank)
        return self._at(low, high > low)

    def last(self, key: Ints, rank: Ints) -> Ints:
        """Returns the rank of the last event before `rank`, -1 if there is none."""
        low, high = self._range(key, rank)
        return self._at(high - 1, high > low)

    def _at(self, index: Ints, known: np.ndarray) -> Ints:
        if not len(self._composite):
            return np.full(len(index), -1, np.int64)
        return np.where(known, self._composite[np.where(known, index, 0)] % self._ranks, -1)

    def _range(self, key: Ints, rank: Ints) -> tuple[Ints, Ints]:
        if not len(self.keys):
            zero = np.zeros(len(key), np.int64)
            return zero, zero
        position = np.minimum(np.searchsorted(self.keys, key), len(self.keys) - 1)
        known = self.keys[position] == key
        wanted = position * self._ranks + np.minimum(rank, self._ranks - 1)
        low = self._start[position]
        high = np.searchsorted(self._composite, wanted)
        return np.where(known, low, 0), np.where(known, high, 0)


@dataclass(frozen=True)
class Pairs:
    """What a slate may know about (history item, candidate) pairs; (P,) each."""

    forward: Ints
    """Users who met the candidate after the history item."""
    backward: Ints
    near: Ints
    """`forward`, each user weighted by 1/gap, in units of 1/1024."""
    light: Ints
    """Both directions, each user weighted by 1/(length - 1), in units of 1/1024; as of time, the
    length the user had then."""


class Statistics:
    """The training part, ready to be asked what a slate may know.

    A user counts an item once, at its first occurrence.
    """

    def __init__(self, train: Sequences, items: int, *, timed: bool) -> None:
        self.items = items
        self.timed = timed
        self.user, self.item, time, self.position = _first_occurrences(train, items)
        self.users = len(train.start) - 1
        self.length = np.bincount(self.user, minlength=self.users)
        self.moments = np.unique(time) if timed else np.zeros(1)
        rank = np.zeros_like(self.item)
        if timed:
            rank = np.searchsorted(self.moments, time).astype(np.int32)
        self.rank = rank
        # With times, nobody asks for a user's own part, nor for depths, which need its end.
        self._own = self._own_order = np.zeros(0, np.int64)
        depth: tuple[Ints, ...] = ()
        if not timed:
            own = self.user.astype(np.int64) * items + self.item
            self._own_order = np.argsort(own, kind="stable")
            self._own = own[self._own_order]
            scaled = self.position.astype(np.int64) * UNIT
            depth = (scaled // np.maximum(self.length[self.user] - 1, 1),)
        self.popularity = EventCounts(self.item, rank, depth)
        started = np.zeros_like(self.user[self.position == 0])
        self.started = EventCounts(started, rank[self.position == 0])
        self._pairs: EventCounts | None = None

    def rank_of(self, time: Floats) -> Ints:
        """Returns the rank of slates in time: events with a smaller rank are known to them."""
        if not self.timed:
            return np.ones(len(time), np.int64)
        return np.searchsorted(self.moments, time).astype(np.int64)

    def own_position(self, user: Ints, item: Ints) -> Ints:
        """Returns where the item stands in the user's own training sequence, -1 if it does not."""
        if self.timed or not len(self._own):
            return np.full(len(item), -1, np.int64)
        key = user * self.items + item
        place = np.minimum(np.searchsorted(self._own, key), len(self._own) - 1)
        known = (self._own[place] == key) & (user >= 0)
        return np.where(known, self.position[self._own_order[place]].astype(np.int64), -1)

    def met(self, user: Ints, item: Ints) -> np.ndarray:
        """Returns whether the user has the item in the training part, at any time."""
        if not len(self._own):
            return np.zeros(len(item), bool)
        key = user * self.items + item
        place = np.minimum(np.searchsorted(self._own, key), len(self._own) - 1)
        return np.asarray((self._own[place] == key) & (user >= 0))

    def counts(self, user: Ints, item: Ints, rank: Ints) -> tuple[Ints, Ints]:
        """Returns how many other users met the item, and the sum of its depths in 1/1024.

        As of time there are no depths.
        """
        if self.timed:
            return self.popularity.before(item, rank)[0], np.zeros_like(item)
        count, depth = self.popularity.before(item, rank)
        own = self.own_position(user, item)
        share = own * UNIT // np.maximum(self.length_of(user) - 1, 1)
        return count - (own >= 0), depth - np.where(own >= 0, share, 0)

    def pairs(self, user: Ints, first: Ints, second: Ints, rank: Ints) -> Pairs:
        """Returns what is known about history items `first` and candidates `second`.

        `count_pairs` has counted them.
        """
        assert self._pairs is not None
        forward, near, light = self._pairs.before(first * self.items + second, rank)
        backward, _, back_light = self._pairs.before(second * self.items + first, rank)
        light = light + back_light
        if not self.timed:
            a, b = self.own_position(user, first), self.own_position(user, second)
            gap = np.where((a >= 0) & (b >= 0), b - a, 0)
            gap = np.where(np.abs(gap) <= WINDOW, gap, 0)
            weight = UNIT // np.maximum(self.length_of(user) - 1, 1)
            forward = forward - (gap > 0)
            backward = backward - (gap < 0)
            near = near - np.where(gap > 0, UNIT // np.maximum(gap, 1), 0)
            light = light - np.where(gap != 0, weight, 0)
        return Pairs(forward, backward, near, light)

    def length_of(self, user: Ints) -> Ints:
        """Returns how many items each user has in the training part; 0 for user -1."""
        if not len(self.length):
            return np.zeros(len(user), np.int64)
        return np.where(user >= 0, self.length[np.maximum(user, 0)], 0)

    @property
    def pair_events(self) -> int:
        """How many pairs of items there are in all users' sequences."""
        near = np.minimum(np.maximum(self.length - 1, 0), WINDOW)
        return int((near * self.length - near * (near + 1) // 2).sum())

    def count_pairs(self, asked: Ints | None = None) -> None:
        """Counts ordered pairs, for `pairs`; a pair happens when its second item does.

        Args:
            asked: The only ones that will be asked for, `first * items + second`; absent: all.
        """
        # What matches is most of the memory: no number is wider than it must be.
        keys, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)]
        near, light = [np.zeros(0, np.int16)], [np.zeros(0, np.int16)]
        self._pairs = None
        wanted = None if asked is None else _Wanted(asked)
        # With times, a user is as long as it was when the pair happened, not as it became.
        longest = int(self.length.max(initial=0))
        for gap, first in itertools.product(
            range(1, min(WINDOW, longest - 1) + 1), range(0, len(self.user), _BLOCK)
        ):
            later = self.user[first + gap : first + gap + _BLOCK]
            inside = first + np.flatnonzero(later == self.user[first : first + len(later)])
            key = self.item[inside].astype(np.int64) * self.items + self.item[inside + gap]
            if wanted is not None:
                kept = wanted.among(key)
                inside, key = inside[kept], key[kept]
            last = inside + gap
            others = self.position[last] if self.timed else self.length[self.user[last]] - 1
            keys.append(key)
            ranks.append(self.rank[last])
            near.append(np.full(len(inside), UNIT // gap, np.int16))
            light.append((UNIT // np.maximum(others, 1)).astype(np.int16))
        self._pairs = EventCounts(_joined(keys), _joined(ranks), (_joined(near), _joined(light)))


def _joined(pieces: list[Any]) -> Any:  # noqa: ANN401 - arrays of one type
    """Returns the pieces as one array, and lets go of them."""
    whole = np.concatenate(pieces)
    pieces.clear()
    return whole


class _Wanted:
    """A set of keys that most others are found not to be in by one look at a small table."""

    def __init__(self, keys: Ints) -> None:
        self._keys = np.unique(keys)
        self._table = np.zeros(2**WANTED_BITS, bool)
        self._table[self._place(self._keys)] = True

    def _place(self, keys: Ints) -> NDArray[np.uint64]:
        # Multiplicative hashing (Knuth, volume 3, 6.4): the golden ratio spreads the keys.
        mixed = keys.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return mixed >> np.uint64(64 - WANTED_BITS)

    def among(self, keys: Ints) -> Ints:
        """Returns the positions of the keys that are in the set."""
        perhaps = np.flatnonzero(self._table[self._place(keys)])
        found = keys[perhaps]
        place = np.minimum(np.searchsorted(self._keys, found), len(self._keys) - 1)
        return np.asarray(perhaps[self._keys[place] == found])


def _first_occurrences(train: Sequences, items: int) -> tuple[Codes, Codes, Floats, Codes]:
    """Returns user, item, time and new position of each user's first event with each item."""
    found = []
    bounds = np.searchsorted(train.start, np.arange(0, len(train.item), _BLOCK))
    for low, high in itertools.pairwise(np.unique([*bounds, len(train.start) - 1]).tolist()):
        begin, end = train.start[low], train.start[high]
        user = np.repeat(np.arange(low, high), np.diff(train.start[low : high + 1]))
        _, index = np.unique(user * items + train.item[begin:end], return_index=True)
        index.sort()
        found.append((user[index].astype(np.int32), begin + index))
    user = np.concatenate([np.zeros(0, np.int32), *(u for u, _ in found)])
    index = np.concatenate([np.zeros(0, np.int64), *(i for _, i in found)])
    start = np.searchsorted(user, np.arange(len(train.start) - 1))
    position = np.arange(len(user)) - start[user]
    return user, train.item[index].astype(np.int32), train.time[index], position.astype(np.int32)
