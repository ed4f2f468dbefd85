"""JSON bodies <-> our types, with the checks of the slate format; and what OpenAPI shows."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from peftrank.errors import ConfigError, DataError
from peftrank.formats._record import item_from_record, slate_from_record
from peftrank.formats.slates import unique_keys
from peftrank.plugins import did_you_mean
from peftrank.ranker import AdapterInfo, Explanation, Prepared
from peftrank.serving.history import Event
from peftrank.serving.settings import ServeSettings
from peftrank.types import Item, RankedList, Slate

_RANK_KEYS = ("slates", "slate", "domain", "k", "explain", "adapter")
_EVENT_KEYS = ("user_id", "domain", "item", "feedback", "timestamp", "event_id")


def parse_json(body: bytes) -> dict[str, Any]:
    """Returns the object a body holds.

    Raises:
        DataError: it is no UTF-8, no JSON, no object, or holds NaN or a key twice.
    """
    try:
        found = json.loads(
            body.decode("utf-8"), object_pairs_hook=unique_keys, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise DataError(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"the body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise DataError(f"the body is not valid JSON: {reason}") from None
    if not isinstance(found, dict):
        raise DataError(f"the body must be a JSON object, not {type(found).__name__}")
    return found


def rank_request(
    body: Mapping[str, Any], settings: ServeSettings
) -> tuple[list[tuple[Slate, bool]], dict[str, Any]]:
    """Returns the slates, each with whether it brought its own history, and the other options.

    Raises:
        DataError: a key or a slate is malformed.
        ConfigError: more is asked for than one request may.
    """
    _check_keys(body, _RANK_KEYS, "a request")
    if ("slates" in body) == ("slate" in body):
        raise DataError("give either `slates`, an array, or `slate`, one object")
    records = body["slates"] if "slates" in body else [body["slate"]]
    if not isinstance(records, list):
        raise DataError("`slates` must be an array of slates")
    if len(records) > settings.max_slates:
        raise ConfigError(
            f"{len(records)} slates in a request; this server takes {settings.max_slates}"
        )
    slates = [_slate(record, str(index), settings) for index, record in enumerate(records)]
    options = {
        "domain": _optional(body, "domain", str),
        "k": _optional(body, "k", int),
        "explain": bool(_optional(body, "explain", bool)),
        "adapter": _optional(body, "adapter", str),
    }
    if options["k"] is not None and options["k"] < 1:
        raise DataError(f"k is {options['k']}; expected at least 1")
    if options["adapter"] not in (None, "none"):
        raise DataError("`adapter` is `none`, for the untrained base, or absent")
    if options["adapter"] and options["explain"]:
        raise DataError("`explain` needs an adapter; leave out `adapter` or `explain`")
    return slates, options


def event_request(body: Mapping[str, Any], settings: ServeSettings) -> list[Event]:
    """Returns the events of a request; one without a time happened now.

    Raises:
        DataError: one is malformed.
        ConfigError: they are too many.
    """
    _check_keys(body, ("events",), "a request")
    records = body.get("events")
    if not isinstance(records, list):
        raise DataError("`events` must be an array of events")
    if len(records) > settings.max_history:
        raise ConfigError(
            f"{len(records)} events in a request; this server takes {settings.max_history}"
        )
    return [_event(record, index) for index, record in enumerate(records)]


def ranking(
    one: Prepared, found: RankedList, explained: Explanation | None, k: int | None
) -> dict[str, Any]:
    """Returns the answer for a slate."""
    answer: dict[str, Any] = {
        "slate_id": found.slate_id,
        "domain": one.domain,
        "version": one.version,
        "item_ids": list(found.item_ids),
        "scores": list(found.scores),
        "explanation": None,
    }
    if explained is not None:
        effects = {
            item.item_id: [row[place] for row in explained.effects]
            for place, item in enumerate(one.slate.candidates)
            if item.item_id in found.item_ids
        }
        history = [one.slate.history[i].item_id for i in explained.history]
        answer["explanation"] = {"history": history, "effects": effects}
    return answer


def adapter_record(
    info: AdapterInfo, active: str | None, versions: Sequence[str]
) -> dict[str, Any]:
    """Returns what /v1/adapters says of one domain."""
    return {**asdict(info), "active": active, "versions": list(versions)}


def _slate(record: Any, name: str, settings: ServeSettings) -> tuple[Slate, bool]:  # noqa: ANN401
    if not isinstance(record, dict):
        raise DataError(f"slate {name}: a slate is an object, not {type(record).__name__}")
    whole = {**record}
    whole.setdefault("slate_id", name)
    whole.setdefault("user_id", "anonymous")
    has_history = record.get("history") is not None
    if not has_history:
        whole["history"] = []
        if record.get("history_feedback") is not None:
            raise DataError(f"slate {name}: history_feedback without a history")
        if "user_id" not in record:
            raise DataError(f"slate {name}: give a history, or the user_id whose history is stored")
    for key, most in (
        ("candidates", settings.max_candidates),
        ("history", settings.max_history),
    ):
        if isinstance(whole.get(key), list) and len(whole[key]) > most:
            raise ConfigError(
                f"slate {whole['slate_id']!r} has {len(whole[key])} {key}; this server takes {most}"
            )
    try:
        return slate_from_record(whole, _no_items_file), has_history
    except ValueError as error:
        raise DataError(str(error)) from None


def _event(record: Any, index: int) -> Event:  # noqa: ANN401
    try:
        if not isinstance(record, dict):
            raise DataError(f"an event is an object, not {type(record).__name__}")
        _check_keys(record, _EVENT_KEYS, "an event")
        timestamp = _optional(record, "timestamp", float)
        return Event(
            user_id=_required(record, "user_id"),
            domain=_required(record, "domain"),
            item=item_from_record(record.get("item"), _no_items_file),
            feedback=_optional(record, "feedback", float),
            timestamp=time.time() if timestamp is None else timestamp,
            event_id=_optional(record, "event_id", str),
        )
    except (DataError, ValueError) as error:
        raise DataError(f"events[{index}]: {error}") from None


def _check_keys(record: Mapping[str, Any], known: Sequence[str], what: str) -> None:
    for key in record:
        if key not in known:
            raise DataError(
                f"unknown key {key!r}{did_you_mean(key, known)}; {what} has {', '.join(known)}"
            )


def _required(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} must be a text")
    return value


def _optional(record: Mapping[str, Any], name: str, kind: type) -> Any:  # noqa: ANN401
    value = record.get(name)
    kinds = (int, float) if kind is float else (kind,)
    right = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if value is not None and not right:
        names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise DataError(f"{name} must be {names[kind]} or null")
    return value


def _no_items_file(item_id: str) -> Item:
    raise ValueError(f"item {item_id!r} has no `fields`: give its text")


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


_ITEM = {
    "type": "object",
    "required": ["item_id", "fields"],
    "properties": {
        "item_id": {"type": "string"},
        "fields": {"type": "object", "additionalProperties": {"type": "string"}},
        "features": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_SLATE = {
    "type": "object",
    "required": ["candidates"],
    "properties": {
        "slate_id": {"type": "string"},
        "user_id": {"type": "string"},
        "history": {"type": "array", "items": _ITEM, "nullable": True},
        "candidates": {"type": "array", "items": _ITEM},
        "history_feedback": {"type": "array", "items": {"type": "number"}, "nullable": True},
        "domain": {"type": "string", "nullable": True},
        "context": {"type": "object", "additionalProperties": {"type": "string"}},
        "timestamp": {"type": "number", "nullable": True},
    },
}
_EXAMPLE = {
    "user_id": "u1",
    "history": [{"item_id": "a", "fields": {"title": "Eagle chicks tagged by rangers"}}],
    "candidates": [
        {"item_id": "b", "fields": {"title": "Central bank holds rates"}},
        {"item_id": "c", "fields": {"title": "Zoo welcomes newborn tapir"}},
    ],
}


def _body(properties: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": dict(properties)}
    content = {"application/json": {"schema": schema, "example": dict(example)}}
    return {"requestBody": {"required": True, "content": content}}


RANK_BODY = _body(
    {
        "slates": {"type": "array", "items": _SLATE},
        "slate": _SLATE,
        "domain": {"type": "string", "nullable": True},
        "k": {"type": "integer", "minimum": 1, "nullable": True},
        "explain": {"type": "boolean"},
        "adapter": {"type": "string", "enum": ["none"], "nullable": True},
    },
    {"domain": "news", "slates": [_EXAMPLE]},
)
EVENT_BODY = _body(
    {
        "events": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["user_id", "domain", "item"],
                "properties": {
                    "user_id": {"type": "string"},
                    "domain": {"type": "string"},
                    "item": _ITEM,
                    "feedback": {"type": "number", "nullable": True},
                    "timestamp": {"type": "number", "nullable": True},
                    "event_id": {"type": "string", "nullable": True},
                },
            },
        }
    },
    {"events": [{"user_id": "u1", "domain": "news", "item": _EXAMPLE["candidates"][0]}]},
)
VERSION_BODY = _body({"version": {"type": "string", "nullable": True}}, {"version": "0002"})
RANK_ANSWER = {
    "rankings": [
        {
            "slate_id": "0",
            "domain": "news",
            "version": "0001",
            "item_ids": ["c", "b"],
            "scores": [1.25, -0.5],
            "explanation": None,
        }
    ]
}


def answers(example: Mapping[str, Any]) -> dict[int | str, dict[str, Any]]:
    """Returns what OpenAPI says of a route's answers."""
    error = {"error": {"type": "data", "message": "slate '0' has no candidates"}}
    failure = {"content": {"application/json": {"example": error}}}
    said = {400: "Malformed", 401: "No or a wrong token", 413: "Too large", 429: "Overloaded"}
    said |= {503: "Shutting down, or a store is out of reach", 504: "Out of time"}
    return {
        200: {"content": {"application/json": {"example": dict(example)}}},
        **{status: {"description": text, **failure} for status, text in said.items()},
    }
