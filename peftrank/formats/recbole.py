"""RecBole atomic files (https://recbole.io/docs/user_guide/data/atomic_files.html).

`*.inter` holds one interaction a row (user, item, optionally rating and timestamp), or a history
and the item that came next (user, item list, item). `*.item` holds the item texts. Columns are
separated by tabs, each named `name:type`.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from peftrank.errors import DataError
from peftrank.formats._lines import text_lines
from peftrank.formats._log import (
    Log,
    LogBuilder,
    OnError,
    Reject,
    Rejects,
    add_item,
    number,
    row_errors,
    text_fields,
)
from peftrank.types import Item

_TYPES = ("token", "token_seq", "float", "float_seq")
_PARTS = ("train", "valid", "test")
_Row = tuple[int, str, dict[str, str]]


def recbole(
    path: Path,
    *,
    on_error: OnError = "raise",
    rejects: Rejects | None = None,
    user: str = "user_id",
    item: str = "item_id",
    rating: str = "rating",
    timestamp: str = "timestamp",
) -> Log:
    """Returns the rows of every `.inter` file in a folder; train, valid, test in this order.

    Item columns of type token and token_seq become text fields, with HTML entities resolved; a
    lone column named `..._title` or `..._name` is called `title`. A list column (type token_seq)
    makes the file one of histories: they are expanded, overlaps between a user's rows counted once,
    the row's own item last, without times.

    Args:
        path: The folder, or one `.inter` file with the `.item` file beside it.
        on_error: What to do about a malformed row.
        rejects: Where skipped rows go.
        user: Column of the user, without its type.
        item: Column of the item, in both files.
        rating: Column of the value, if there is one.
        timestamp: Column of the time in seconds, if there is one.

    Raises:
        DataError: a file or column is missing, or a row is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    folder = path if path.is_dir() else path.parent
    inters = [path] if path.is_file() else sorted(path.glob("*.inter"), key=_order)
    item_files = sorted(folder.glob("*.item"))
    if not inters or not item_files:
        raise DataError("expected *.inter and *.item files here", path=path)
    items: dict[str, Item] = {}
    for file in item_files:
        _read_items(file, item, items, reject)
    log = LogBuilder(items)
    for file in inters:
        columns = (user, item, rating, timestamp)
        _read_interactions(file, columns, log, reject)
    return log.build(rejects)


def _order(path: Path) -> tuple[int, str]:
    parts = [_PARTS.index(word) for word in path.name.split(".") if word in _PARTS]
    return (parts[0] if parts else len(_PARTS), path.name)


def _header(path: Path, reject: Reject) -> tuple[dict[str, str], Iterator[tuple[int, str]]]:
    lines = text_lines(path, reject)
    line, text = next(lines, (1, ""))
    columns = {}
    for cell in text.split("\t"):
        name, _, kind = cell.strip().partition(":")
        if kind not in _TYPES:
            raise DataError(
                f"header cell {cell!r} is not name:type with a type of {', '.join(_TYPES)}",
                path=path,
                line=line,
            )
        columns[name] = kind
    return columns, lines


def _rows(path: Path, columns: dict[str, str], lines: Iterator[tuple[int, str]]) -> Iterator[_Row]:
    for line, text in lines:
        cells = text.split("\t")
        row = dict(zip(columns, cells, strict=False)) if len(cells) == len(columns) else {}
        yield line, text, row


def _need(row: dict[str, str], text: str, columns: dict[str, str]) -> None:
    if not row:
        given = len(text.split("\t"))
        raise ValueError(f"the row has {given} columns, the header has {len(columns)}")


def _read_items(path: Path, item: str, items: dict[str, Item], reject: Reject) -> None:
    columns, lines = _header(path, reject)
    if item not in columns:
        raise DataError(f"no column {item!r}; the header has {', '.join(columns)}", path=path)
    texts = [n for n, kind in columns.items() if kind.startswith("token") and n != item]
    titles = [n for n in texts if n.endswith(("_title", "_name"))]
    names = {n: n for n in texts}
    if "title" not in texts and len(titles) == 1:
        names[titles[0]] = "title"
    for line, text, row in _rows(path, columns, lines):
        try:
            _need(row, text, columns)
            fields = text_fields(**{names[n]: html.unescape(row[n]) for n in texts})
            if not fields:
                raise ValueError(f"item id {row[item]!r} has no text")
            add_item(items, row[item], fields)
        except ValueError as error:
            reject(path, line, str(error), text)


def _read_interactions(
    path: Path, names: tuple[str, str, str, str], log: LogBuilder, reject: Reject
) -> None:
    columns, lines = _header(path, reject)
    user, item, rating, timestamp = names
    missing = [name for name in (user, item) if name not in columns]
    if missing:
        raise DataError(
            f"no column {' and '.join(missing)}; the header has {', '.join(columns)}", path=path
        )
    history = _history_column(path, columns)
    for line, text, row in _rows(path, columns, lines):
        try:
            _need(row, text, columns)
            if history:
                log.add_sequence(row[user], row[history].split(), row[item])
                continue
            time = number(row[timestamp], timestamp) if timestamp in columns else float("nan")
            value = number(row[rating], rating) if rating in columns else 1.0
            log.add(row[user], row[item], time, value)
        except ValueError as error:
            reject(path, line, str(error), text)


def _history_column(path: Path, columns: dict[str, str]) -> str | None:
    lists = [name for name, kind in columns.items() if kind == "token_seq"]
    if len(lists) > 1:
        lists = [name for name in lists if name.startswith("item")]
    if len(lists) > 1:
        raise DataError(f"several item list columns: {', '.join(lists)}", path=path, line=1)
    return lists[0] if lists else None
