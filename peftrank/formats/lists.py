"""Ready candidate lists: a JSON array of objects, items named by their titles.

One list is `{"historyList": "A::B", "itemList": ["C", "D"], "trueSelection": "D"}`. The file is
held in memory as a whole: this layout is for lists of megabytes, not gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peftrank.errors import DataError
from peftrank.formats._json import check_characters, first_twice
from peftrank.formats._log import Impression, Log, LogBuilder, OnError, Reject, Rejects, row_errors
from peftrank.types import Item

_KEYS = {"historyList", "itemList", "trueSelection"}
_SPACE = " \t\r\n"
_Row = tuple[int, str, Any]


def lists(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns the lists as impressions, with label 1 for the selection and 0 for the others.

    The data names no user. A list whose history is the end of the preceding list's history and
    selection goes on with that list's user; any other starts a new one, named as its slate: file
    name and 0-based position. Parted from each other, such lists would tell each other's
    selections. A user's interactions are the history, then the selection, without times.

    Args:
        path: A `.json` file, or a folder of them.
        on_error: What to do about a malformed list.
        rejects: Where skipped lists go.

    Raises:
        DataError: a file is not a JSON array, or a list is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    if not files:
        raise DataError("expected a .json file, or a folder of them", path=path)
    impressions = [row for file in files for row in _read(file, reject)]
    titles = dict.fromkeys(
        title for row in impressions for title in (*row.history, *row.candidates)
    )
    log = LogBuilder({title: Item(title, {"title": title}) for title in titles})
    log.impressions = impressions
    for row in impressions:
        selected = [c for c, label in zip(row.candidates, row.labels or (), strict=True) if label]
        for title in (*row.history, *selected):
            log.add(row.user_id, title)
    return log.build(rejects)


def _read(path: Path, reject: Reject) -> Iterator[Impression]:
    user = ""
    met: tuple[str, ...] = ()
    for position, (line, text, value) in enumerate(_elements(path)):
        try:
            check_characters(text, value)
            history, candidates, labels = _list(value)
        except (ValueError, RecursionError) as error:
            reject(path, line, str(error), text)
            continue
        name = f"{path.stem}-{position}"
        if not history or met[-len(history) :] != history:
            user = name
        met = (*history, *(c for c, label in zip(candidates, labels, strict=True) if label))
        yield Impression(name, user, history, candidates, labels, None)


def _elements(path: Path) -> Iterator[_Row]:
    """Yields (line, text, value) of each element of the array."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the file: {error}", path=path) from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError("the file is not valid UTF-8", path=path, line=line) from error
    decoder = json.JSONDecoder()
    at, line = _skip(text, 0, 1)
    if text[at : at + 1] != "[":
        raise DataError("expected a JSON array of lists", path=path, line=line)
    at, line = _skip(text, at + 1, line)
    while text[at : at + 1] != "]":
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise DataError(f"not valid JSON: {error.msg}", path=path, line=error.lineno) from None
        except ValueError as error:  # a number of thousands of digits
            raise DataError(f"not valid JSON: {error}", path=path, line=line) from None
        except RecursionError:
            raise DataError("not valid JSON: nested too deeply", path=path, line=line) from None
        yield line, text[at:end], value
        line += text.count("\n", at, end)
        at, line = _skip(text, end, line)
        if text[at : at + 1] == ",":
            at, line = _skip(text, at + 1, line)
            if text[at : at + 1] == "]":
                raise DataError("not valid JSON: a comma before ]", path=path, line=line)
        elif text[at : at + 1] != "]":
            raise DataError("not valid JSON: expected , or ] here", path=path, line=line)
    at, line = _skip(text, at + 1, line)
    if at < len(text):
        raise DataError("not valid JSON: text after the array", path=path, line=line)


def _skip(text: str, at: int, line: int) -> tuple[int, int]:
    start = at
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at, line + text.count("\n", start, at)


def _list(value: Any) -> tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]:  # noqa: ANN401
    if not isinstance(value, dict) or set(value) != _KEYS:
        keys = ", ".join(map(repr, value)) if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"expected exactly the keys {', '.join(sorted(_KEYS))}, not {keys}")
    history, candidates, selection = (
        value["historyList"],
        value["itemList"],
        value["trueSelection"],
    )
    if not isinstance(history, str):
        raise ValueError("historyList must be one text of titles separated by ::")
    if not isinstance(candidates, list) or not all(isinstance(c, str) for c in candidates):
        raise ValueError("itemList must be an array of titles")
    titles = history.split("::") if history else []
    if not candidates or not all(title.strip() for title in (*titles, *candidates)):
        raise ValueError("a title is empty, or itemList is")
    if (twice := first_twice(candidates)) is not None:
        raise ValueError(f"{twice!r} occurs twice in itemList")
    if selection not in candidates:
        raise ValueError(f"trueSelection {selection!r} is not in itemList")
    labels = tuple(float(title == selection) for title in candidates)
    return tuple(titles), tuple(candidates), labels
