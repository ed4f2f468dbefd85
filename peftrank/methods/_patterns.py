"""Patterns that name modules by the end of a path: PEFT's `rank_pattern`, `alpha_pattern`."""

from __future__ import annotations

import re

MOST_REPEATS = 2
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_GROUP = re.compile(r"\([^()]*\)")
_LONGEST = 1000
_PATH = 64
"""Characters of a path that is long."""
_MOST_STEPS: int = 4 * _PATH ** (MOST_REPEATS + 1)


def compiled(pattern: str) -> re.Pattern[str]:
    """Returns what matches a path that a pattern names, by the rule of PEFT's get_pattern_key.

    Raises:
        re.error: it is no valid pattern.
    """
    return re.compile(rf"(.*\.)?({pattern})$")


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern names a module; raises as `compiled`."""
    return compiled(pattern).match(path) is not None


def steps(pattern: str, length: int) -> int:
    """Returns about how many ways matching may try at the most on a path of so many characters."""
    if _REPEATED_GROUP.search(pattern) or len(pattern) > _LONGEST:
        return 1 << length
    repeats = len(re.findall(r"[*+{]", pattern)) + 1  # and that of the path before it
    ways = 1 << pattern.count("?")
    while found := _GROUP.search(pattern):
        ways *= found[0].count("|") + 1
        pattern = pattern.replace(found[0], "", 1)
    tries: int = length**repeats
    return tries * ways * (pattern.count("|") + 1)


def endless(pattern: str) -> bool:
    """Returns whether matching may take for ever: too many repeats, options and choices."""
    return steps(pattern, _PATH) > _MOST_STEPS
