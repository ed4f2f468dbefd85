"""The errors users see. Each message says what was given, what was expected, and what to do."""

from __future__ import annotations

from pathlib import Path


class PeftRankError(Exception):
    """Base of every error this package raises on purpose. The CLI prints it without a traceback."""

    exit_code = 2
    """What the command line exits with."""


class ConfigError(PeftRankError):
    """A configuration key, option or name is unknown, out of range or contradicts another."""


class DataError(PeftRankError):
    """A row of input is malformed. `path` and `line` (1-based) say where, when known."""

    def __init__(self, reason: str, *, path: Path | str | None = None, line: int | None = None):
        self.reason = reason
        self.path = path
        self.line = line
        where = "" if path is None else f"{path}:" + (f"{line}: " if line is not None else " ")
        super().__init__(where + reason)


class AdapterError(PeftRankError):
    """An adapter folder is missing, damaged, or belongs to another base."""


class BaseModelError(PeftRankError):
    """A base model cannot be found or loaded, or cannot do what was asked of it."""
