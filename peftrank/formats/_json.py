"""JSON texts of strangers. Whatever is wrong with one is a ValueError that a person understands.

Knows nothing of what the values mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def json_value(text: str) -> Any:  # noqa: ANN401 - any JSON value
    """Returns the value that a whole text holds.

    Raises:
        ValueError: it is not JSON, nests too deeply, or names a key twice in one object.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deeply") from None
    except ValueError as error:  # a key that occurs twice, a number of thousands of digits
        raise ValueError(f"not valid JSON: {error}") from None


def check_characters(text: str, value: Any) -> None:  # noqa: ANN401
    r"""Raises ValueError if a JSON text spells half a character ("\ud800") in its value.

    No file and no tokenizer can hold it.
    """
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("a text holds a lone surrogate, which is no character") from None


def unique_keys(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Returns an object's pairs as a dict; raises ValueError if a key occurs twice."""
    given = list(pairs)
    record = dict(given)
    if len(record) < len(given):
        raise ValueError(f"key {first_twice(key for key, _ in given)!r} occurs twice in one object")
    return record


def first_twice(values: Iterable[Any]) -> Any:  # noqa: ANN401 - one of the values
    """Returns the first value that was there before, None if all differ. Linear in time."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None
