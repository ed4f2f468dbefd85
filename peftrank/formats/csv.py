"""Your own data as two CSV files: `clicks.csv` (user, item, time) and `items.csv` (item, title)."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from peftrank.formats._lines import csv_rows
from peftrank.formats._log import (
    Log,
    LogBuilder,
    OnError,
    Rejects,
    add_item,
    number,
    row_errors,
    text_fields,
)
from peftrank.types import Item


def csv(
    path: Path,
    *,
    on_error: OnError = "raise",
    rejects: Rejects | None = None,
) -> Log:
    """Returns the rows of `clicks.csv` and the items of `items.csv`, both with a header, UTF-8.

    `clicks.csv` has the columns `user` and `item`, and, where known, `time` (Unix seconds, or ISO
    8601, which without a zone means UTC) and `value` (a rating or a count); without `time`, a
    user's rows are in the order of the file. `items.csv` has the column `item`; each other column
    is a text field of the item, by its name.

    Args:
        path: The folder of the two files (`.csv` or `.csv.gz`).
        on_error: What to do about a malformed row.
        rejects: Where skipped rows go.

    Raises:
        DataError: a file or column is missing, or a row is malformed and `on_error` is `raise`.
    """
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    items: dict[str, Item] = {}
    file = _file(Path(path), "items")
    for line, text, cells in csv_rows(file, reject, columns=("item",)):
        item_id = cells.pop("item")
        try:
            fields = text_fields(**cells)
            if not fields:
                raise ValueError(f"item {item_id!r} has no text")
            add_item(items, item_id, fields)
        except ValueError as error:
            reject(file, line, str(error), text)
    log = LogBuilder(items)
    file = _file(Path(path), "clicks")
    for line, text, cells in csv_rows(file, reject, columns=("user", "item")):
        try:
            time = _seconds(cells["time"]) if "time" in cells else float("nan")
            value = number(cells["value"], "value") if "value" in cells else 1.0
            log.add(cells["user"], cells["item"], time, value)
        except ValueError as error:
            reject(file, line, str(error), text)
    return log.build(rejects)


def _file(folder: Path, name: str) -> Path:
    packed = folder / f"{name}.csv.gz"
    return packed if packed.is_file() else folder / f"{name}.csv"


def _seconds(text: str) -> float:
    try:
        return number(text, "time")
    except ValueError:
        try:
            moment = datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(
                f"time is {text!r}, expected Unix seconds or a date as 2025-03-01T12:00:00"
            ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
