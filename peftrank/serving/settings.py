"""What a server is told: its limits and its tokens."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class ServeSettings:
    """Limits of one server process."""

    batch_tokens: int = 8192
    """Tokens taken from the queue at a time."""
    max_wait_ms: float = 5.0
    """How long a request may wait for others when the server is idle."""
    queue_tokens: int = 262_144
    """Tokens that may wait; beyond it requests are refused with 429."""
    timeout_seconds: float = 30.0
    """From the arrival of a request to its answer; then 504."""
    grace_seconds: float = 30.0
    """How long requests in flight may take after SIGTERM."""
    drain_seconds: float = 1.0
    """After SIGTERM, how long /readyz says 503 before the port is closed."""
    max_body_bytes: int = 2_000_000
    max_slates: int = 256
    """Per request."""
    max_candidates: int = 1_000
    """Per slate."""
    max_history: int = 1_000
    """Items per slate, and events per request to /v1/events."""
    watch_seconds: float = 1.0
    """How often the store's ACTIVE files are looked at; 0: never."""
    token: str | None = field(default=None, repr=False)
    """Needed for /v1/ if set."""
    admin_token: str | None = field(default=None, repr=False)
    """Needed to change what is loaded; without one nobody can."""

    def with_tokens(self) -> ServeSettings:
        """Returns these with the tokens of PEFTRANK_TOKEN and PEFTRANK_ADMIN_TOKEN."""
        return replace(
            self,
            token=os.environ.get("PEFTRANK_TOKEN") or None,
            admin_token=os.environ.get("PEFTRANK_ADMIN_TOKEN") or None,
        )
