"""A slate or an item as a plain record (the shape it has in a file), and back, with every check.

Pure functions: nothing here opens a file. Messages name the slate, the key and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftrank.plugins import did_you_mean
from peftrank.types import Item, Slate

REQUIRED = ("slate_id", "user_id", "history", "candidates")
SLATE_KEYS = (
    *REQUIRED, "labels", "history_feedback", "timestamp", "domain", "context", "weights", "tasks",
)  # fmt: skip
ITEM_KEYS = ("item_id", "fields", "features")
Lookup = Callable[[str], Item]
"""Item id to item with its text; raises ValueError when it is in no items file."""


def slate_from_record(record: Any, lookup: Lookup) -> Slate:  # noqa: ANN401 - any JSON value
    """Returns the slate of a record.

    An item is `{"item_id", "fields", "features"}`, an id alone, or an object without `fields`;
    the last two take their text from `lookup`.

    Raises:
        ValueError: the record breaks a rule of the format.
    """
    slate_id = record.get("slate_id") if isinstance(record, dict) else None
    try:
        return _slate(record, lookup)
    except ValueError as error:
        if isinstance(slate_id, str):
            raise ValueError(f"slate {slate_id!r}: {error}") from None
        raise


def slate_record(slate: Slate, *, by_id: bool = False) -> dict[str, Any]:
    """Returns the record of a slate, with every key; `weights` and `tasks` only if it has some.

    Args:
        slate: The slate.
        by_id: Leave the items' text out; it is in an items file.

    Raises:
        ValueError: the slate breaks a rule of the format, so that it could not be read back.
    """
    record: dict[str, Any] = {
        "slate_id": slate.slate_id,
        "user_id": slate.user_id,
        "history": [item_record(item, with_fields=not by_id) for item in slate.history],
        "candidates": [item_record(item, with_fields=not by_id) for item in slate.candidates],
        "labels": _plain(slate.labels),
        "history_feedback": _plain(slate.history_feedback),
        "timestamp": None if slate.timestamp is None else _plain_number(slate.timestamp),
        "domain": slate.domain,
        "context": dict(slate.context),
    }
    if slate.weights is not None:
        record["weights"] = _plain(slate.weights)
    if slate.tasks:
        record["tasks"] = {
            name: [None if v is None else _plain_number(v) for v in values]
            for name, values in slate.tasks.items()
        }
    slate_from_record(record, Item)
    return record


def item_from_record(record: Any, lookup: Lookup) -> Item:  # noqa: ANN401
    """Returns the item of a record; see `slate_from_record`."""
    if isinstance(record, str):
        return lookup(_text(record, "item_id"))
    if not isinstance(record, dict):
        raise ValueError(f"an item is an object or an item id, not {_shown(record)}")
    _check_keys(record, ITEM_KEYS, ("item_id",), "an item")
    item_id = _text(record["item_id"], "item_id")
    features = _features(record.get("features"), item_id)
    if record.get("fields") is None:
        known = lookup(item_id)
        return Item(item_id, known.fields, {**known.features, **features})
    return Item(item_id, _texts(record["fields"], f"fields of item {item_id!r}"), features)


def item_record(item: Item, *, with_fields: bool = True) -> dict[str, Any]:
    """Returns the record of an item."""
    record: dict[str, Any] = {"item_id": item.item_id}
    if with_fields:
        record["fields"] = dict(item.fields)
    if item.features:
        record["features"] = {name: _plain_number(v) for name, v in item.features.items()}
    return record


def _slate(record: Any, lookup: Lookup) -> Slate:  # noqa: ANN401
    if not isinstance(record, dict):
        raise ValueError(f"a slate is an object with keys, not {_shown(record)}")
    _check_keys(record, SLATE_KEYS, REQUIRED, "a slate")
    history = _items(record["history"], "history", lookup)
    candidates = _items(record["candidates"], "candidates", lookup)
    if not candidates:
        raise ValueError("candidates is empty; a slate needs at least one candidate")
    seen: set[str] = set()
    for item in candidates:
        if item.item_id in seen:
            raise ValueError(f"candidate {item.item_id!r} occurs twice; name each item once")
        seen.add(item.item_id)
    domain = record.get("domain")
    timestamp = record.get("timestamp")
    context = record.get("context")
    return Slate(
        slate_id=_text(record["slate_id"], "slate_id"),
        user_id=_text(record["user_id"], "user_id"),
        history=history,
        candidates=candidates,
        labels=_numbers(record.get("labels"), "labels", len(candidates), "candidates", 0.0),
        history_feedback=_numbers(
            record.get("history_feedback"), "history_feedback", len(history), "history items"
        ),
        timestamp=None if timestamp is None else _number(timestamp, "timestamp"),
        domain=None if domain is None else _text(domain, "domain"),
        context={} if context is None else _texts(context, "context"),
        weights=_numbers(record.get("weights"), "weights", len(candidates), "candidates", 0.0),
        tasks=_tasks(record.get("tasks"), len(candidates)),
    )


def _check_keys(
    record: Mapping[str, Any], known: Sequence[str], required: Sequence[str], what: str
) -> None:
    for key in record:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f"unknown key {key!r}{hint}; {what} has {', '.join(known)}")
    for key in required:
        if key not in record:
            raise ValueError(f"key {key!r} is missing; {what} needs {', '.join(required)}")


def _items(value: Any, name: str, lookup: Lookup) -> tuple[Item, ...]:  # noqa: ANN401
    if not isinstance(value, list):
        raise ValueError(f"{name} must be an array of items, not {_shown(value)}")
    return tuple(item_from_record(record, lookup) for record in value)


def _text(value: Any, name: str) -> str:  # noqa: ANN401
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text, not {_shown(value)}")
    if not value:
        raise ValueError(f"{name} is empty")
    _check_unicode(value, name)
    return value


def _texts(value: Any, name: str) -> dict[str, str]:  # noqa: ANN401
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object of texts, not {_shown(value)}")
    for key, text in value.items():
        if not isinstance(key, str):  # a map of another tool's Parquet file
            raise ValueError(f"{name}: the key {key!r} must be a text")
        if not isinstance(text, str):
            raise ValueError(f"{name}: {key!r} must be a text, not {_shown(text)}")
        _check_unicode(key, name)
        _check_unicode(text, name)
    return value


def _check_unicode(text: str, name: str) -> None:
    # JSON can spell half a character ("\\ud800"), which no file and no tokenizer can hold.
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a lone surrogate, {ascii(text)[:60]}") from None


def _features(value: Any, item_id: str) -> dict[str, float]:  # noqa: ANN401
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(
            f"features of item {item_id!r} must be an object of numbers, not {_shown(value)}"
        )
    for key, number in value.items():
        if not isinstance(key, str):
            raise ValueError(f"features of item {item_id!r}: the key {key!r} must be a text")
        _check_unicode(key, f"features of item {item_id!r}")
        if number is None:
            raise ValueError(
                f"feature {key!r} of item {item_id!r} is null; leave an unknown feature out"
            )
    return {k: _number(v, f"feature {k!r} of item {item_id!r}") for k, v in value.items()}


def _tasks(value: Any, length: int) -> dict[str, tuple[float | None, ...]]:  # noqa: ANN401
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"tasks must be an object of arrays of numbers, not {_shown(value)}")
    return {_text(name, "a task's name"): _task(name, v, length) for name, v in value.items()}


def _task(name: str, values: Any, length: int) -> tuple[float | None, ...]:  # noqa: ANN401
    what = f"tasks[{name!r}]"
    if not isinstance(values, list):
        raise ValueError(f"{what} must be an array of numbers, not {_shown(values)}")
    if len(values) != length:
        raise ValueError(
            f"{what} has {len(values)} values for {length} candidates; give one each, null where "
            "it is unknown"
        )
    numbers = tuple(
        None if v is None else _number(v, f"{what}[{place}]") for place, v in enumerate(values)
    )
    for place, number in enumerate(numbers):
        if number is not None and number < 0:
            raise ValueError(f"{what}[{place}] is {number}; it must be at least 0")
    return numbers


def _numbers(
    value: Any,  # noqa: ANN401
    name: str,
    length: int,
    of: str,
    least: float = -math.inf,
) -> tuple[float, ...] | None:
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"{name} must be an array of numbers or null, not {_shown(value)}")
    if len(value) != length:
        raise ValueError(f"{name} has {len(value)} numbers for {length} {of}; give one each")
    numbers = tuple(_number(v, f"{name}[{place}]") for place, v in enumerate(value))
    for place, number in enumerate(numbers):
        if number < least:
            raise ValueError(f"{name}[{place}] is {number}; it must be at least {least:g}")
    return numbers


def _number(value: Any, name: str) -> float:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, not {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}; it must be a finite number")
    return number


def _plain(numbers: Sequence[float] | None) -> list[Any] | None:
    return None if numbers is None else [_plain_number(number) for number in numbers]


def _plain_number(number: float) -> float:
    # numpy and torch scalars are numbers too, but neither JSON nor the checks know them.
    return number if isinstance(number, bool | int | float) else float(number)


def _shown(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "null"
    try:
        text = repr(value)
    except RecursionError:  # JSON may nest deeper than Python prints
        return "a value nested too deeply"
    return text if len(text) <= 60 else text[:57] + "..."
