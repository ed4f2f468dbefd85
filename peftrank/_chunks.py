"""Slates side by side: every (candidate, history item) pair of several lists in flat arrays.

Letters in shapes: M candidates and P pairs of the chunk.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from peftrank._counting import Pairs, Statistics
from peftrank._lists import Ints, Lists

DECAY = 0.8
"""Weight of a history item relative to the next newer one."""


class Chunk:
    """Some slates, with their (candidate, history item) pairs: history runs fastest."""

    def __init__(self, lists: Lists, statistics: Statistics, slates: Ints, limit: int) -> None:
        """Collects the slates at the given positions, their newest `limit` history items."""
        length = np.diff(lists.history_start)[slates]
        self.full_length = length
        length = np.minimum(length, limit)
        width = np.diff(lists.candidate_start)[slates]
        self.rows = ranges(lists.candidate_start[slates], width)
        self.slate = np.repeat(np.arange(len(slates)), width)
        self.item = lists.candidate[self.rows]
        self.user = lists.user[slates][self.slate]
        self.time = lists.time[slates][self.slate]
        self.rank = statistics.rank_of(self.time)
        self.length = length[self.slate]
        first = (lists.history_start[slates + 1] - length)[self.slate]
        self.history = lists.history[ranges(first, self.length)]
        self.candidate = np.repeat(np.arange(len(self.rows)), self.length)
        start = np.cumsum(self.length) - self.length
        place = np.arange(len(self.history)) - start[self.candidate]
        self.age = self.length[self.candidate] - 1 - place
        self.known = self.length > 0
        self._start = start[self.known]
        self._last = (start + self.length - 1)[self.known]
        self._statistics = statistics

    @cached_property
    def pairs(self) -> Pairs:
        """What is known about each pair, (P,) each."""
        user, rank = self.pair(self.user), self.pair(self.rank)
        return self._statistics.pairs(user, self.history, self.pair(self.item), rank)

    @property
    def pair_keys(self) -> Ints:
        """What `Statistics.count_pairs` has to count for these pairs, (2P,)."""
        item, items = self.pair(self.item), self._statistics.items
        return np.concatenate((self.history * items + item, item * items + self.history))

    @cached_property
    def of_history(self) -> Ints:
        """How many users met the history item, (P,)."""
        user, rank = self.pair(self.user), self.pair(self.rank)
        return self._statistics.counts(user, self.history, rank)[0]

    @cached_property
    def of_item(self) -> Ints:
        """How many users met the candidate, (M,)."""
        return self._statistics.counts(self.user, self.item, self.rank)[0]

    @cached_property
    def decay(self) -> np.ndarray:
        """Weight of each pair by the age of its history item, (P,)."""
        return np.asarray(DECAY**self.age)

    def sum(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the sum over the history for each candidate, NaN without a history."""
        return self._spread(np.add.reduceat(pairs, self._start) if len(self._start) else pairs)

    def mean(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the mean over the history for each candidate, NaN without a history."""
        return self.sum(pairs) / np.maximum(self.length, 1)

    def max(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the largest over the history for each candidate, NaN without a history."""
        return self._spread(np.maximum.reduceat(pairs, self._start) if len(self._start) else pairs)

    def last(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the value of the newest history item for each candidate, or NaN."""
        return self._spread(pairs[self._last])

    def _spread(self, values: np.ndarray) -> np.ndarray:
        full = np.full(len(self.rows), np.nan)
        full[self.known] = values
        return full

    def pair(self, column: np.ndarray) -> np.ndarray:
        """Returns a candidate column repeated for each pair."""
        return column[self.candidate]


def ranges(start: Ints, length: Ints) -> Ints:
    """Returns start[0], start[0]+1, ... for each range, one after another."""
    offset = np.cumsum(length) - length
    return np.asarray(np.arange(int(length.sum())) + np.repeat(start - offset, length))
