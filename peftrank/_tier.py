"""Values kept within a budget of bytes; those used longest ago go first.

Says nothing about what the values are or where they come from.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(eq=False)
class _Entry(Generic[T]):
    value: T
    nbytes: int
    pinned: bool
    used: int


class Tier(Generic[T]):
    """A bounded cache. `get` takes no lock, so that readers never wait for one another."""

    def __init__(self, budget: int | None):
        """`budget`: bytes kept; None for no limit. A value that alone exceeds it is not kept."""
        self.budget = budget
        self._entries: dict[Hashable, _Entry[T]] = {}
        self._writing = threading.Lock()
        self._clock = itertools.count()

    @property
    def nbytes(self) -> int:
        """Bytes of all values kept."""
        return sum(entry.nbytes for entry in list(self._entries.values()))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def get(self, key: Hashable) -> T | None:
        """Returns the value and counts as a use; None if it is not kept."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        entry.used = next(self._clock)
        return entry.value

    def put(self, key: Hashable, value: T, nbytes: int, *, pinned: bool = False) -> None:
        """Keeps a value; unpinned others go, longest unused first, until all fit the budget.

        A pinned value is kept whatever its size.
        """
        if self.budget is not None and nbytes > self.budget and not pinned:
            self.drop(key)
            return
        with self._writing:
            self._entries[key] = _Entry(value, nbytes, pinned, next(self._clock))
            if self.budget is None:
                return
            excess = self.nbytes - self.budget
            others = (k for k, e in self._entries.items() if k != key and not e.pinned)
            for other in sorted(others, key=lambda k: self._entries[k].used):
                if excess <= 0:
                    break
                excess -= self._entries.pop(other).nbytes

    def drop(self, key: Hashable) -> None:
        """Lets go of a value, if it is kept."""
        with self._writing:
            self._entries.pop(key, None)
