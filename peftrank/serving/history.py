"""What each user did, kept between requests: the store of histories behind real-time ranking.

`open_history` opens one by its URL. A file (SQLite) serves one machine and needs nothing else;
Redis serves several machines. Both behave the same: the newest `max_items` events of each user
in each domain are kept, in the order of their time and, at equal times, of their arrival. This
file knows what an event is and how it is written; the two stores know where.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from peftrank.errors import ConfigError, DataError, PeftRankError
from peftrank.formats._record import item_from_record, item_record
from peftrank.types import Item

_SCHEMES = "sqlite:///FILE, sqlite:// (in memory), redis://HOST:PORT/0 or rediss://HOST:PORT/0"


class HistoryError(PeftRankError):
    """The store of histories cannot be reached, read or written. Nothing of the call was kept."""


@dataclass(frozen=True, slots=True)
class Event:
    """A user met an item: read, bought, watched or rated it."""

    user_id: str
    domain: str
    item: Item
    feedback: float | None
    """A rating or a play count, None when there is none."""
    timestamp: float
    """When it happened: UTC epoch seconds."""
    event_id: str | None = None
    """Makes retries safe: of events of a user in a domain with one id, the first is kept."""


class History(Protocol):
    """An open store of histories, for any number of threads; its calls block."""

    def append(self, events: Sequence[Event]) -> int:
        """Returns how many events were stored; the others are repetitions, by their `event_id`.

        When it returns, the events are stored; when it raises, none is. An event that is older
        than all of a full history counts as stored, and is pruned at once.

        Raises:
            DataError: an event holds what cannot be stored; the message names it by its place.
            HistoryError: the store cannot be reached or written.
        """

    def recent(self, user_id: str, domain: str, n: int) -> list[Event]:
        """Returns the newest `n` events of a user in a domain, oldest first.

        Raises:
            DataError: the user id or the domain is no text.
            HistoryError: the store cannot be reached or read.
        """

    def forget(self, user_id: str) -> int:
        """Returns how many events of a user were deleted: all, with their ids.

        Raises:
            DataError: the user id is no text.
            HistoryError: the store cannot be reached or written.
        """

    def ping(self) -> None:
        """Raises HistoryError if the store cannot be reached."""

    def close(self) -> None:
        """Gives connections back; any later call raises HistoryError."""


def open_history(url: str, *, max_items: int = 500, remember_seconds: float = 86_400.0) -> History:
    """Returns the store of histories at a URL.

    A SQLite file is created where there is none. Redis is first spoken to by the first call, so
    that a server starts while its Redis is down; `ping` tells.

    Args:
        url: `sqlite:///relative/file`, `sqlite:////absolute/file`, `sqlite://` (in memory),
            `redis://user:password@host:port/0` or `rediss://...` (TLS).
        max_items: Events kept per user and domain; beyond it, the oldest are deleted.
        remember_seconds: How long the `event_id` of a deleted event is still known.

    Raises:
        ConfigError: the URL names no store, a number is out of range, or Redis is not installed.
        HistoryError: the file cannot be opened, is damaged, or belongs to another program.
    """
    if max_items < 1:
        raise ConfigError(f"max_items is {max_items}; a history keeps at least 1 event")
    if not (math.isfinite(remember_seconds) and remember_seconds >= 0):
        raise ConfigError(f"remember_seconds is {remember_seconds}; expected 0 or more seconds")
    # No message shows the URL: it may hold a password.
    scheme = url.partition("://")[0] if "://" in url else ""
    if scheme == "sqlite":
        from peftrank.serving._history_sqlite import SqliteHistory

        return SqliteHistory(
            _sqlite_path(url), max_items=max_items, remember_seconds=remember_seconds
        )
    if scheme in ("redis", "rediss"):
        from peftrank.serving._history_redis import RedisHistory

        return RedisHistory(
            url, _redis_address(url), max_items=max_items, remember_seconds=remember_seconds
        )
    raise ConfigError(f"the history's URL begins with {scheme!r}; expected {_SCHEMES}")


def encode(events: Sequence[Event]) -> list[bytes]:
    """Returns each event, less its user and domain, as JSON.

    Raises:
        DataError: an event holds what cannot be stored.
    """
    bodies = []
    for place, event in enumerate(events):
        try:
            bodies.append(_encode(event))
        except ValueError as error:
            raise DataError(f"events[{place}]: {error}") from None
    return bodies


def decode(user_id: str, domain: str, body: bytes) -> Event:
    """Returns the event of what `encode` made of it.

    Raises:
        HistoryError: it is nothing that `encode` makes.
    """
    try:
        record = json.loads(body)
        return Event(
            user_id=user_id,
            domain=domain,
            item=item_from_record(record["item"], Item),
            feedback=record["feedback"],
            timestamp=record["timestamp"],
            event_id=record["event_id"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise HistoryError(
            "the history holds an event that cannot be read, so the store was damaged or changed "
            "by another program. Restore it from a copy, or delete this user's history."
        ) from error


def check_text(value: str, name: str) -> str:
    """Returns the text; raises DataError unless it is one that a store can hold."""
    try:
        return _text(value, name)
    except ValueError as error:
        raise DataError(str(error)) from None


def _encode(event: Event) -> bytes:
    _text(event.user_id, "user_id")
    _text(event.domain, "domain")
    if event.event_id is not None:
        _text(event.event_id, "event_id")
    item = item_record(event.item)
    item_from_record(item, Item)  # so that what is written can be read back
    record = {
        "timestamp": _number(event.timestamp, "timestamp"),
        "feedback": None if event.feedback is None else _number(event.feedback, "feedback"),
        "event_id": event.event_id,
        "item": item,
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be a text of at least one character")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds half a character (a lone surrogate)") from None
    return value


def _number(value: float, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise ValueError(f"{name} must be a finite number")
    return number


def _sqlite_path(url: str) -> Path | None:
    """Returns the file of a URL, None for a history in memory."""
    rest = url.removeprefix("sqlite://")
    if not rest:
        return None
    name = rest.removeprefix("/")
    if name == rest or not name or "\0" in name:
        raise ConfigError(
            f"the history's URL {url!r} names no file; expected sqlite:///relative/file, "
            "sqlite:////absolute/file or sqlite:// (in memory)"
        )
    return Path(name)


def _redis_address(url: str) -> str:
    """Returns `scheme://host:port/database`, which is all that messages may show of a URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "localhost", parts.port or 6379
        database = int(parts.path.strip("/") or 0)
    except ValueError:  # its message may quote a piece of the password
        raise ConfigError(
            "the history's URL cannot be read; expected redis://user:password@HOST:PORT/0, with "
            "any of / # ? @ : % in the password written as %2F %23 %3F %40 %3A %25"
        ) from None
    return f"{parts.scheme}://{host}:{port}/{database}"
