"""Patterns that name modules by the end of a path: PEFT's `rank_pattern`, `alpha_pattern`."""

from __future__ import annotations

import re

MOST_REPEATS = 2
_REPEATS = re.compile(r"[*+{]")
_REPEATED_GROUP = re.compile(r"\)[*+{]")


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern names a module, by the rule of PEFT's get_pattern_key.

    Raises:
        re.error: it is no valid pattern.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def endless(pattern: str) -> bool:
    """Returns whether matching may take exponential time: many repeats, or a repeated group."""
    many = len(_REPEATS.findall(pattern)) > MOST_REPEATS
    return many or _REPEATED_GROUP.search(pattern) is not None
