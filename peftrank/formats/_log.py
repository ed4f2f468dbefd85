"""What a raw log becomes, whatever its format: items, interaction columns, impressions.

Interactions are columns (numpy arrays of codes beside two vocabularies), so a log of ten million
rows takes 20 bytes a row. Row errors are handled here too: raised with file and line, or written
to a quarantine file with their reason and counted. This file knows no format and no slate.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from peftrank.errors import ConfigError, DataError
from peftrank.types import Item

OnError = Literal["raise", "skip"]
_LARGEST = float(np.finfo(np.float32).max)
QUARANTINES = ("rejects", "quarantine")
"""Files of these names, whatever the suffix, are no data: a reader may be writing them."""
_ROW_CHARACTERS = 65_536
"""A rejected row is quoted in the quarantine file up to this length."""


@dataclass(frozen=True, slots=True)
class Interaction:
    """One row of the columns of a `Log`, by name."""

    user_id: str
    item_id: str
    timestamp: float | None
    """UTC epoch seconds."""
    value: float
    """A rating, a play count, or 1.0 where the log only says that it happened."""


@dataclass(frozen=True, slots=True)
class Impression:
    """A candidate list that was really shown. All ids are keys of `Log.items`."""

    slate_id: str
    user_id: str
    history: tuple[str, ...]
    """Oldest first."""
    candidates: tuple[str, ...]
    labels: tuple[float, ...] | None
    timestamp: float | None
    part: str = ""
    """`train`, `valid` or `test` where the raw files say so, else empty."""


class Rejects:
    """The rows that could not be read: counted, and written as JSON lines with their reason.

    Each line of the file holds `file`, `line` (1-based, null when unknown), `reason` and `row`.
    The file is emptied on construction, so that it only ever describes one run.
    """

    def __init__(self, path: Path | None = None, *, examples: int = 20) -> None:
        self.path = path
        self.count = 0
        self.by_file: dict[str, int] = {}
        self.examples: list[str] = []
        """The first messages, for a summary."""
        self._keep = examples
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")

    def add(self, path: Path, line: int | None, reason: str, row: str) -> None:
        """Counts one rejected row and writes it to the quarantine file, if there is one."""
        self.count += 1
        self.by_file[str(path)] = self.by_file.get(str(path), 0) + 1
        if len(self.examples) < self._keep:
            self.examples.append(str(DataError(reason, path=path, line=line)))
        if self.path is None:
            return
        record = {"file": str(path), "line": line, "reason": reason, "row": row[:_ROW_CHARACTERS]}
        with self.path.open("a", encoding="ascii") as file:
            file.write(json.dumps(record) + "\n")


@dataclass
class Log:
    """A raw log in memory. Row i: user `user_ids[user[i]]` met item `item_ids[item[i]]`."""

    items: dict[str, Item]
    user_ids: list[str]
    item_ids: list[str]
    """Every key of `items`, in the same order, whether it occurs in a row or not."""
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    timestamp: NDArray[np.float64]
    """UTC epoch seconds, NaN = unknown. Where unknown, a user's rows stand in chronological
    order, if the format has one."""
    value: NDArray[np.float32]
    impressions: list[Impression] = field(default_factory=list)
    rejects: Rejects = field(default_factory=Rejects)
    """What was left out of this log."""

    def __len__(self) -> int:
        """Returns the number of interactions."""
        return len(self.user)

    def interactions(self) -> Iterator[Interaction]:
        """Yields the rows by name, in file order. For small logs and tests."""
        columns = zip(self.user, self.item, self.timestamp, self.value, strict=True)
        for user, item, timestamp, value in columns:
            time = None if np.isnan(timestamp) else float(timestamp)
            yield Interaction(self.user_ids[user], self.item_ids[item], time, float(value))

    def order(self) -> NDArray[np.int64]:
        """Returns row indices grouped by user, oldest first.

        Equal times keep file order; rows of unknown time come first, in file order.
        """
        time = np.where(np.isnan(self.timestamp), -np.inf, self.timestamp)
        return np.lexsort((time, self.user))


Reject = Callable[[Path, "int | None", str, str], None]


def row_errors(on_error: OnError, rejects: Rejects) -> Reject:
    """Returns what a reader calls on a bad row: `reject(path, line, reason, row)`.

    Raises:
        ConfigError: `on_error` is neither `raise` nor `skip`.
    """
    if on_error == "skip":
        return rejects.add
    if on_error == "raise":
        return _raise
    raise ConfigError(f"on_error takes 'raise' or 'skip', not {on_error!r}")


def _raise(path: Path, line: int | None, reason: str, row: str) -> None:
    raise DataError(reason, path=path, line=line)


class LogBuilder:
    """Collects a log row by row; `build` makes the columns."""

    def __init__(self, items: dict[str, Item]) -> None:
        self.items = items
        self.impressions: list[Impression] = []
        self._item_codes = {item_id: code for code, item_id in enumerate(items)}
        self._user_codes: dict[str, int] = {}
        self._sequences: dict[str, array[int]] = {}
        self._user = array("i")
        self._item = array("i")
        self._timestamp = array("d")
        self._value = array("f")

    def add(
        self, user_id: str, item_id: str, timestamp: float = float("nan"), value: float = 1.0
    ) -> None:
        """Appends one interaction.

        Raises:
            ValueError: no such item, an empty user id or a value that `check_value` refuses;
                nothing was appended.
        """
        item = self._item_codes.get(item_id)
        if item is None:
            raise ValueError(_no_item(item_id))
        if not user_id:
            raise ValueError("the user id is empty")
        check_value(value)
        self._user.append(self._user_codes.setdefault(user_id, len(self._user_codes)))
        self._item.append(item)
        self._timestamp.append(timestamp)
        self._value.append(value)

    def add_sequence(self, user_id: str, history: Sequence[str], target: str) -> None:
        """Appends what is new in a row that holds a history and the item that came next.

        Such files repeat a user's past in each row (up to a window), so the overlap with what is
        known of the user is not counted twice.

        Raises:
            ValueError: an item has no text; nothing was appended.
        """
        row = (*history, target)
        self.check_items(row)
        codes = array("i", [self._item_codes[item_id] for item_id in row])
        known = self._sequences.setdefault(user_id, array("i"))
        start = known_start(known, codes)
        known.extend(codes[start:])
        for item_id in row[start:]:
            self.add(user_id, item_id)

    def check_items(self, item_ids: Sequence[str]) -> None:
        """Raises ValueError for the first id that has no text."""
        for item_id in item_ids:
            if item_id not in self._item_codes:
                raise ValueError(_no_item(item_id))

    def build(self, rejects: Rejects) -> Log:
        """Returns the log."""
        return Log(
            items=self.items,
            user_ids=list(self._user_codes),
            item_ids=list(self.items),
            user=np.array(self._user, dtype=np.int32),
            item=np.array(self._item, dtype=np.int32),
            timestamp=np.array(self._timestamp, dtype=np.float64),
            value=np.array(self._value, dtype=np.float32),
            impressions=self.impressions,
            rejects=rejects,
        )


def check_value(value: float) -> None:
    """Raises ValueError unless the column of values can hold it: at least 0, and a float32."""
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"value is {value}, expected at least 0 and at most {_LARGEST:g}")


def _no_item(item_id: str) -> str:
    return f"item id {item_id!r} has no usable row in the items file of this data"


def known_start(known: array[int], row: array[int]) -> int:
    """Returns how many items at the start of a row continue what is known. Linear in time."""
    history = row[:-1]
    if history and known[-len(history) :] == history:
        return len(history)
    if _holds(known, row):
        return len(row)  # an older row that comes later in the file
    # Knuth, Morris and Pratt: `ends[i]` is the size of the longest start of the row that ends at i.
    ends, size = [0] * len(row), 0
    for place in range(1, len(row)):
        while size and row[place] != row[size]:
            size = ends[size - 1]
        size += row[place] == row[size]
        ends[place] = size
    size = 0
    for item in known[-len(row) :]:
        while size and item != row[size]:
            size = ends[size - 1]
        size += item == row[size]
    return size


def _holds(known: array[int], row: array[int]) -> bool:
    """Returns whether a row's items stand in a row in what is known."""
    text, part = known.tobytes(), row.tobytes()
    at = text.find(part)
    while at % known.itemsize and at > 0:  # between two items
        at = text.find(part, at + 1)
    return at >= 0


def add_item(items: dict[str, Item], item_id: str, fields: Mapping[str, str]) -> None:
    """Adds an item, or adds fields that an earlier row of the same item lacks.

    Raises:
        ValueError: the id is empty, or an earlier row gives one of the fields another text.
    """
    if not item_id:
        raise ValueError("the item id is empty")
    known = items[item_id].fields if item_id in items else {}
    for name, text in fields.items():
        if known.get(name, text) != text:
            raise ValueError(
                f"item id {item_id!r} already has {name} {known[name]!r}, here it is {text!r}; "
                "one id must mean one item (with on_error='skip' the first row is kept)"
            )
    items[item_id] = Item(item_id, {**known, **fields})


def number(text: str, name: str) -> float:
    """Returns a finite number.

    Raises:
        ValueError: it is none; the message names the column.
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} is {text!r}, expected a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{name} is {text!r}, expected a finite number")
    return value


def text_fields(**fields: str | None) -> Mapping[str, str]:
    """Returns the fields that have text, stripped of surrounding white space."""
    stripped = ((name, (text or "").strip()) for name, text in fields.items())
    return {name: text for name, text in stripped if text}
