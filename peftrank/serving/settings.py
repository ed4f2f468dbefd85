"""What a server is told: its limits and its tokens."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from peftrank.errors import ConfigError

_ABOVE_ZERO = (
    "batch_tokens", "batch_seconds", "queue_tokens", "max_requests", "timeout_seconds",
    "max_body_bytes", "max_slates", "max_candidates", "max_history", "max_events", "history_items",
)  # fmt: skip
_NOT_BELOW_ZERO = ("max_wait_ms", "grace_seconds", "drain_seconds", "watch_seconds")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Limits of one server process; ConfigError where a number makes no sense."""

    batch_tokens: int = 8192
    """Scored together, at most."""
    batch_seconds: float = 0.5
    """Fewer tokens are scored together where they would take longer, at the rate measured."""
    max_wait_ms: float = 5.0
    """How long the first request after an idle moment may wait for others."""
    queue_tokens: int = 262_144
    """Tokens that may wait; beyond it requests are refused with 429."""
    max_requests: int = 256
    """Requests under way; beyond it they are refused with 429."""
    timeout_seconds: float = 30.0
    """From the arrival of a request to its answer; then 504."""
    grace_seconds: float = 30.0
    """How long requests in flight may take after SIGTERM."""
    drain_seconds: float = 1.0
    """After SIGTERM, how long /readyz says 503 before the port is closed."""
    watch_seconds: float = 1.0
    """How often the store's ACTIVE files are looked at; 0: never."""
    max_body_bytes: int = 2_000_000
    max_slates: int = 256
    """Per request."""
    max_candidates: int = 1_000
    """Per slate."""
    max_history: int = 1_000
    """History items per slate."""
    max_events: int = 1_000
    """Per request."""
    history_items: int = 100
    """The newest stored events that a slate without a history gets."""
    token: str | None = field(default=None, repr=False)
    """Needed for /v1/ if set."""
    admin_token: str | None = field(default=None, repr=False)
    """Needed to change what is loaded or delete histories; without one nobody can."""

    def __post_init__(self) -> None:
        for name in (*_ABOVE_ZERO, *_NOT_BELOW_ZERO):
            value = getattr(self, name)
            least_ok = value > 0 if name in _ABOVE_ZERO else value >= 0
            if not (math.isfinite(value) and least_ok):
                expected = "more than 0" if name in _ABOVE_ZERO else "0 or more"
                raise ConfigError(f"{name} is {value}; expected {expected}")

    def with_tokens(self, environment: Mapping[str, str] = os.environ) -> ServeSettings:
        """Returns these with the tokens of PEFTRANK_TOKEN and PEFTRANK_ADMIN_TOKEN.

        Raises:
            ConfigError: one is set and empty, as a missing secret leaves it.
        """
        token = _token(environment, "PEFTRANK_TOKEN")
        return replace(self, token=token, admin_token=_token(environment, "PEFTRANK_ADMIN_TOKEN"))


def _token(environment: Mapping[str, str], name: str) -> str | None:
    token = environment.get(name)
    if token is not None and not token.strip():
        raise ConfigError(f"{name} is set and empty; give it a value or unset it")
    return token
