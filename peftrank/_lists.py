"""The two tables that preparing data is made of: what users did, and the lists made of it.

Users and items are codes (positions in two vocabularies kept elsewhere). No logic lives here.
Letters in shapes: U users, E events, S slates, M candidates of all slates, K history items of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Codes = NDArray[np.int32]
"""Where there is one for each event of a log: half the bytes. Keys made of them are Ints."""

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Sequences:
    """What every user did, oldest first. Rows start[u]:start[u+1] are those of user u."""

    start: Ints
    """(U+1,)"""
    item: Codes
    """(E,)"""
    time: Floats
    """(E,) UTC epoch seconds, NaN = unknown."""
    value: NDArray[np.float32]
    """(E,) rating, play count, or 1."""


@dataclass(frozen=True)
class Shown:
    """Candidates that were really shown in the training part, one row each."""

    user: Ints
    item: Ints
    time: Floats
    clicked: NDArray[np.bool_]


@dataclass(frozen=True)
class Lists:
    """Candidate lists with their users and histories. Those of one user and part are adjacent."""

    slate_ids: tuple[str, ...]
    user: Ints
    """(S,)"""
    part: Ints
    """(S,) index into PARTS."""
    time: Floats
    """(S,) UTC epoch seconds, NaN = unknown."""
    history_start: Ints
    """(S+1,) history of slate s: history[history_start[s]:history_start[s+1]], oldest first."""
    history: Ints
    """(K,) items."""
    feedback: Floats
    """(K,) what the user gave each history item."""
    candidate_start: Ints
    """(S+1,)"""
    candidate: Ints
    """(M,) items."""
    label: Floats
    """(M,) relevance >= 0; NaN = unknown."""

    def __len__(self) -> int:
        """Returns the number of slates."""
        return len(self.user)
