"""Bodies of requests as slates and events, with the checks and messages that files get.

Knows neither the server nor the ranker; `_openapi.py` describes the same bodies to people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from peftrank.errors import DataError, PeftRankError
from peftrank.formats._record import item_from_record, slate_from_record
from peftrank.formats.slates import unique_keys
from peftrank.plugins import did_you_mean
from peftrank.serving.history import Event
from peftrank.serving.settings import ServeSettings
from peftrank.types import Item, Slate

_RANK_KEYS = ("slates", "slate", "domain", "k", "explain", "adapter")
_EVENT_KEYS = ("user_id", "domain", "item", "feedback", "timestamp", "event_id")


class LimitError(PeftRankError):
    """A request is larger than this server takes."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RankCall:
    """The body of POST /v1/rank."""

    slates: list[Slate]
    stored: frozenset[int]
    """Slates that brought no history, by their place: they are to have the stored one."""
    domain: str | None
    k: int | None
    explain: bool
    untrained: bool

    def domain_of(self, slate: Slate) -> str | None:
        """Returns the domain a slate is ranked in, if any was given."""
        return slate.domain if self.domain is None else self.domain


def rank_call(body: bytes, limits: ServeSettings) -> RankCall:
    """Returns what a body asks for.

    Raises:
        DataError: it is malformed; the message names the slate and the key.
        LimitError: it is larger than the limits.
    """
    with _explained():
        value = _object(body, _RANK_KEYS)
        records = _records(value, limits)
        k = value.get("k")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
            raise ValueError("k must be a whole number of at least 1, or null for all candidates")
        if value.get("adapter") not in (None, "none"):
            raise ValueError('adapter must be "none" (the untrained base), or left out')
        stored = (place for place, record in enumerate(records) if record.get("history") is None)
        return RankCall(
            slates=[_slate(record, place, limits) for place, record in enumerate(records)],
            stored=frozenset(stored),
            domain=_optional_text(value, "domain"),
            k=k,
            explain=_flag(value, "explain"),
            untrained=value.get("adapter") == "none",
        )


def events(body: bytes, limits: ServeSettings, now: float) -> list[Event]:
    """Returns the events of the body of POST /v1/events.

    Args:
        body: JSON.
        limits: How many are taken.
        now: The time of events that have none.

    Raises:
        DataError: it is malformed; the message names the event by its place.
        LimitError: too many events.
    """
    with _explained():
        records = _object(body, ("events",)).get("events")
        if not isinstance(records, list):
            raise ValueError("the request needs events, an array of objects")
        if len(records) > limits.max_events:
            raise LimitError(
                f"the request has {len(records)} events; this server takes {limits.max_events} "
                "at a time"
            )
    made = []
    for place, record in enumerate(records):
        with _explained(f"events[{place}]: "):
            made.append(_event(record, now))
    return made


def version_named(body: bytes, *, needed: bool) -> str | None:
    """Returns the `version` of the body of an admin call; an empty body names none.

    Raises:
        DataError: it is malformed, or the version is missing.
    """
    with _explained():
        version = _optional_text(_object(body or b"{}", ("version",)), "version")
        if needed and version is None:
            raise ValueError('the request needs a version: {"version": "0001"}')
        return version


@contextmanager
def _explained(where: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataError(f"{where}{error}") from None


def _object(body: bytes, keys: Sequence[str]) -> dict[str, Any]:
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_number
        )
    except UnicodeDecodeError as error:
        raise ValueError(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except RecursionError:
        raise ValueError("the body is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"the body must be a JSON object with {', '.join(keys)}")
    _check_keys(value, keys, "the request")
    return value


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON; leave an unknown value out, or write null")


def _check_keys(value: Mapping[str, Any], keys: Sequence[str], what: str) -> None:
    for key in value:
        if key not in keys:
            hint = did_you_mean(key, keys)
            raise ValueError(f"unknown key {key!r}{hint}; {what} has {', '.join(keys)}")


def _optional_text(value: Mapping[str, Any], key: str) -> str | None:
    text = value.get(key)
    if text is not None and (not isinstance(text, str) or not text):
        raise ValueError(f"{key} must be a text of at least one character, or null")
    return text


def _flag(value: Mapping[str, Any], key: str) -> bool:
    flag = value.get(key)
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(f"{key} must be true or false")
    return bool(flag)


def _records(value: Mapping[str, Any], limits: ServeSettings) -> list[dict[str, Any]]:
    if (value.get("slates") is None) == (value.get("slate") is None):
        raise ValueError("the request needs slates, an array; or slate, a single one")
    records = [value["slate"]] if value.get("slates") is None else value["slates"]
    if not isinstance(records, list):
        raise ValueError("slates must be an array of slates")
    if len(records) > limits.max_slates:
        raise LimitError(
            f"the request has {len(records)} slates; this server takes {limits.max_slates} "
            "at a time"
        )
    for place, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"slates[{place}] must be an object with keys")
    return records


def _slate(record: Mapping[str, Any], place: int, limits: ServeSettings) -> Slate:
    slate_id = record.get("slate_id", str(place))
    for key, most in (("candidates", limits.max_candidates), ("history", limits.max_history)):
        given = record.get(key)
        if isinstance(given, list) and len(given) > most:
            raise LimitError(
                f"slate {_id(slate_id)} has {len(given)} {key}; this server takes at most {most}"
            )
    filled = {"user_id": "anonymous", **record, "slate_id": slate_id}
    if record.get("history") is None:
        filled["history"] = []
        if record.get("user_id") is None:
            raise ValueError(
                f"slate {_id(slate_id)}: give a history, or the user_id whose history is stored"
            )
        if record.get("history_feedback") is not None:
            raise ValueError(
                f"slate {_id(slate_id)}: history_feedback needs the history it belongs to"
            )
    return slate_from_record(filled, _no_text)


def _id(slate_id: object) -> str:
    return repr(slate_id) if isinstance(slate_id, str) else "without a readable id"


def _no_text(item_id: str) -> Item:
    raise ValueError(
        f"item {item_id!r} has no fields; the server knows no items, so send its text: "
        '{"item_id": ..., "fields": {"title": ...}}'
    )


def _event(record: Any, now: float) -> Event:  # noqa: ANN401 - any JSON value
    if not isinstance(record, dict):
        raise ValueError(f"an event must be an object with {', '.join(_EVENT_KEYS)}")
    _check_keys(record, _EVENT_KEYS, "an event")
    for key in ("user_id", "domain", "item"):
        if record.get(key) is None:
            raise ValueError(f"key {key!r} is missing; an event needs user_id, domain and item")
    timestamp = _finite(record, "timestamp")
    return Event(
        user_id=_optional_text(record, "user_id") or "",
        domain=_optional_text(record, "domain") or "",
        item=item_from_record(record["item"], _no_text),
        feedback=_finite(record, "feedback"),
        timestamp=now if timestamp is None else timestamp,
        event_id=_optional_text(record, "event_id"),
    )


def _finite(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if math.isfinite(number):  # JSON's 1e999 is not
                return number
    except OverflowError:
        pass
    raise ValueError(f"{key} must be a finite number or null")
