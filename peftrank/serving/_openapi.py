"""What the API looks like, for OpenAPI and for the page at /docs. Nothing is parsed by it."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema

DESCRIPTION = (
    "Ranks candidates for users with one base and an adapter per domain. Errors are "
    '`{"error": {"type", "message"}}`. Where the server has a token, send it as '
    "`Authorization: Bearer TOKEN`."
)
_FIELDS = {"title": "Rain ends a dry spring"}
_ITEM = {"item_id": "n7", "fields": _FIELDS}
_OTHER = {"item_id": "n9", "fields": {"title": "The cup final, minute by minute"}}
_SLATE = {"user_id": "u1", "candidates": [_ITEM, _OTHER]}
_READ = {"item_id": "n3", "fields": {"title": "Farmers wait for water"}}


class _Described(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Item(_Described):
    """One thing that can be recommended."""

    item_id: str
    fields: dict[str, str] = Field(description="Text by name; a domain's prompt reads some.")
    features: dict[str, float] = Field({}, description="Numbers known about a candidate.")


class Slate(_Described):
    """One candidate list of one user: the record of a slates file."""

    slate_id: str | None = Field(None, description="Absent: its place, 0, 1, ...")
    user_id: str | None = Field(None, description="Needed where the history is the stored one.")
    candidates: list[Item]
    history: list[Item] | None = Field(
        None, description="Oldest first. Absent: what the server has stored for the user."
    )
    history_feedback: list[float] | None = None
    domain: str | None = None
    context: dict[str, str] | None = None
    timestamp: float | None = None
    labels: list[float] | None = Field(None, description="Not used for ranking.")


class RankRequest(_Described):
    """Give `slates`, or `slate` for one."""

    slates: list[Slate] | None = None
    slate: Slate | None = None
    domain: str | None = Field(None, description="Of all slates; absent: each slate's own.")
    k: int | None = Field(None, ge=1, description="Keep the best k; absent: all.")
    explain: bool = Field(
        False, description="Tell what each history item did; costs a pass for each of them."
    )
    adapter: Literal["none"] | None = Field(
        None, description='"none": the untrained base, read by likelihood.'
    )


class Explanation(_Described):
    """How much each history item raises a candidate, relative to the list's mean."""

    history: list[str]
    effects: dict[str, list[float]]


class Ranking(_Described):
    """A slate's candidates, best first."""

    slate_id: str
    domain: str
    version: str = Field(description="The adapter's version that gave these scores.")
    item_ids: list[str]
    scores: list[float]
    explanation: Explanation | None


class RankResponse(_Described):
    """The rankings in the order of the slates."""

    rankings: list[Ranking]


class Event(_Described):
    """A user met an item."""

    user_id: str
    domain: str
    item: Item
    feedback: float | None = None
    timestamp: float | None = Field(None, description="UTC epoch seconds; absent: now.")
    event_id: str | None = Field(None, description="Makes retries safe: the first is kept.")


class EventsRequest(_Described):
    """Events of any users and domains."""

    events: list[Event]


class EventsResponse(_Described):
    """All are kept when this arrives."""

    stored: int
    duplicates: int


class Deleted(_Described):
    """What was forgotten."""

    deleted: int


class Version(_Described):
    """A version of a domain's adapter."""

    version: str | None = None


class Adapter(BaseModel):
    """What of a domain is loaded, and what the store has."""

    domain: str
    version: str | None = Field(description="The one that serves; null: none.")
    active: str | None = Field(description="The store's active one.")
    versions: list[str]
    stale: bool = Field(description="The active version could not be loaded.")
    method: str | None = None
    nbytes: int | None = None
    tier: str | None = None


class Adapters(_Described):
    """The base and every domain."""

    base: dict[str, str | int]
    adapters: list[Adapter]


class Samples(_Described):
    """Slates of the embedded sample."""

    slates: list[Slate]


class ErrorBody(_Described):
    """What went wrong, for people."""

    type: Literal["data", "config", "adapter", "auth", "limit", "overloaded", "timeout", "internal"]
    message: str


class Error(_Described):
    """The body of every answer that is not 200."""

    error: ErrorBody


_BODIES = (RankRequest, EventsRequest, Version)
_ERRORS = {
    400: "The request is malformed, beyond a limit, or names what is not there.",
    401: "The token is missing or wrong.",
    403: "The token may not do this, or the server takes no admin calls.",
    404: "There is no such thing.",
    413: "The body, or the request's tokens, are more than the server ever takes.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A fault of the server.",
    503: "Starting, stopping, or the store of histories cannot be used.",
    504: "It took too long.",
}


def _route(
    summary: str,
    answer: type[BaseModel] | None,
    errors: tuple[int, ...] = (),
    body: type[BaseModel] | None = None,
    examples: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Returns what FastAPI is told about a route."""
    told: dict[str, Any] = {
        "summary": summary,
        "responses": {
            **({} if answer is None else {200: {"model": answer}}),
            **{status: {"model": Error, "description": _ERRORS[status]} for status in errors},
        },
    }
    if body is not None:
        content: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{body.__name__}"}}
        if examples:
            content["examples"] = {name: {"value": value} for name, value in examples.items()}
        told["openapi_extra"] = {
            "requestBody": {"required": True, "content": {"application/json": content}}
        }
    return told


_ADMIN = (400, 401, 403, 503)
RANK = _route(
    "Rank the candidates of one or many slates",
    RankResponse,
    (400, 401, 413, 429, 500, 503, 504),
    RankRequest,
    {
        "one slate, stored history": {"domain": "news", "slate": _SLATE},
        "several, each with its domain": {
            "slates": [{**_SLATE, "slate_id": "a", "domain": "news", "history": [_READ]}],
            "k": 10,
            "explain": True,
        },
    },
)
EVENTS = _route(
    "Append to users' histories",
    EventsResponse,
    (400, 401, 413, 503, 504),
    EventsRequest,
    {
        "a click": {
            "events": [{"user_id": "u1", "domain": "news", "item": _READ, "event_id": "e-41"}]
        }
    },
)
FORGET = _route("Forget a user's history (admin)", Deleted, (401, 403, 503))
ADAPTERS = _route("What is loaded and stored", Adapters, (401, 503))
LOAD = _route(
    "Load a version, or the active one, until another is activated (admin)",
    Adapter,
    _ADMIN,
    Version,
    {"a version": {"version": "0002"}},
)
UNLOAD = _route("Stop serving a domain (admin)", Adapter, _ADMIN)
ACTIVATE = _route(
    "Make a version the store's active one (admin)",
    Adapter,
    _ADMIN,
    Version,
    {"a version": {"version": "0002"}},
)
SAMPLES = _route("Slates of the embedded sample", Samples, (401, 404))
HEALTH = _route("Whether the process works", None, (500,))
READY = _route("Whether it ranks", None, (503,))
METRICS = _route("Metrics, in Prometheus' text format", None)


def describe(app: FastAPI) -> None:
    """Makes the application's OpenAPI hold the schemas of the bodies it parses itself."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(
                title=app.title, version=app.version, description=app.description, routes=app.routes
            )
            _, found = models_json_schema(
                [(body, "validation") for body in _BODIES],
                ref_template="#/components/schemas/{model}",
            )
            schemas = made["components"]["schemas"]
            schemas |= {name: s for name, s in found["$defs"].items() if name not in schemas}
            schemas.pop("HTTPValidationError", None)
            schemas.pop("ValidationError", None)
            for path in made["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # answered 400
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def page(openapi: Mapping[str, Any]) -> str:
    """Returns a page about the API, of plain HTML: it needs no other host and runs no script."""
    parts = []
    for path, operations in openapi["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}.</p>")
            content = operation.get("requestBody", {}).get("content", {})
            for name, example in content.get("application/json", {}).get("examples", {}).items():
                shown = html.escape(json.dumps(example["value"], indent=2))
                parts.append(f"<p>For example, {html.escape(name)}:</p><pre>{shown}</pre>")
            told = [
                f"<li>{status}: {html.escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
                if status != "200"
            ]
            parts.append(f"<ul>{''.join(told)}</ul>" if told else "")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>PeftRank: API</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="stylesheet" href="page/style.css"></head><body><main>'
        f"<h1>API</h1><p>{html.escape(openapi['info']['description'])}</p>"
        '<p>The same for programs, with every key: <a href="openapi.json">openapi.json</a>.</p>'
        f"{''.join(parts)}</main></body></html>"
    )
