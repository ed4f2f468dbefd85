"""The package's own files: slates and items as JSON lines or Parquet, and rankings.

Everything is streamed: a file of any size is read and written in constant memory, except the
items file, whose texts are held by id. `slates` makes a `Log` of such a file, as the other
formats do. `_record.py` holds the rules of a row, `_rankings.py` the rankings.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftrank.errors import ConfigError, DataError
from peftrank.files import writing
from peftrank.formats._json import json_value
from peftrank.formats._json import unique_keys as unique_keys
from peftrank.formats._lines import text_lines
from peftrank.formats._log import (
    QUARANTINES,
    Impression,
    Log,
    LogBuilder,
    OnError,
    Reject,
    Rejects,
    add_item,
    check_value,
    row_errors,
)
from peftrank.formats._parquet import ITEMS, SLATES, parquet_records, write_parquet
from peftrank.formats._rankings import read_run, write_qrels, write_rankings
from peftrank.formats._record import (
    ITEM_KEYS,
    SLATE_KEYS,
    Lookup,
    item_from_record,
    item_record,
    slate_from_record,
    slate_record,
)
from peftrank.types import Item, Slate

__all__ = [
    "read_items",
    "read_run",
    "read_slates",
    "slates",
    "write_items",
    "write_qrels",
    "write_rankings",
    "write_slates",
]
_JSON = (".jsonl", ".jsonl.gz")
_SUFFIXES = (*_JSON, ".parquet")
_NOT_SLATES = ("items", *QUARANTINES)
_Items = Path | str | Mapping[str, Item]


def slates(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns a file or folder of slates as a log: impressions, and relevant candidates.

    An interaction is a candidate with a label above 0, at the slate's time, its label the value.
    Candidate features, contexts and history feedback have no place in a log; use `read_slates`
    where they matter.

    Raises:
        DataError: a slate is malformed and `on_error` is `raise`.
    """
    rejects = Rejects() if rejects is None else rejects
    items: dict[str, Item] = {}
    rows = []
    reject = row_errors(on_error, rejects)
    for slate in read_slates(Path(path), on_error=on_error, quarantine=rejects):
        try:
            for item in (*slate.history, *slate.candidates):
                add_item(items, item.item_id, item.fields)
            for label in slate.labels or ():
                check_value(label)
        except ValueError as error:
            reject(Path(path), None, f"slate {slate.slate_id!r}: {error}", slate.slate_id)
            continue
        rows.append(slate)
    log = LogBuilder(items)
    for slate in rows:
        log.impressions.append(_impression(slate))
        time = float("nan") if slate.timestamp is None else slate.timestamp
        for item, label in zip(slate.candidates, slate.labels or (), strict=False):
            if label > 0:
                log.add(slate.user_id, item.item_id, time, label)
    return log.build(rejects)


def read_slates(
    path: Path | str,
    *,
    items: _Items | None = None,
    on_error: OnError = "raise",
    quarantine: Path | Rejects | None = None,
) -> Iterator[Slate]:
    """Yields the slates of a file, or of a folder of shards in the order of their names.

    Args:
        path: `.jsonl`, `.jsonl.gz` or `.parquet`, or a folder of them. In a folder, files named
            `items.*`, `rejects.*` or `quarantine.*` are no shards, nor are those that start with
            `.` or `_`.
        items: Where slates that name items by id find their text: a file, or the items
            themselves. Absent: `items.jsonl`, `.jsonl.gz` or `.parquet` beside the slates, opened
            only when an id needs it.
        on_error: `skip` writes a malformed row to the quarantine and goes on.
        quarantine: With `skip`: a file that rejected rows are written to, or a `Rejects` to
            count them with.

    Raises:
        ConfigError: `skip` without a quarantine.
        DataError: a file is missing or damaged, or a row is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    if on_error == "skip" and quarantine is None:
        raise ConfigError("on_error='skip' needs quarantine=, a file for the rows left out")
    rejects = quarantine if isinstance(quarantine, Rejects) else Rejects(quarantine)
    reject = row_errors(on_error, rejects)
    lookup = item_lookup(path, items, reject)
    return read_files(slate_files(path), lookup, reject)


def write_slates(path: Path | str, slates: Iterable[Slate], *, by_id: bool = False) -> int:
    """Writes slates, streamed and atomically, and returns how many.

    Args:
        path: `.jsonl`, `.jsonl.gz` or `.parquet`.
        slates: The slates.
        by_id: Name items by id, with their features but without their text; write the items
            file with `write_items`.

    Raises:
        ConfigError: the suffix is none of these.
        DataError: a slate could not be read back (an empty candidate list, a NaN label, ...).
            Nothing is written then.
    """
    return _write(Path(path), _checked(slates, lambda s: slate_record(s, by_id=by_id)), SLATES)


def read_items(
    path: Path | str, *, on_error: OnError = "raise", quarantine: Path | Rejects | None = None
) -> dict[str, Item]:
    """Returns the items of an items file (JSON lines or Parquet), by id.

    Raises:
        ConfigError: `skip` without a quarantine.
        DataError: a row is malformed, or an id occurs twice, and `on_error` is `raise`.
    """
    if on_error == "skip" and quarantine is None:
        raise ConfigError("on_error='skip' needs quarantine=, a file for the rows left out")
    rejects = quarantine if isinstance(quarantine, Rejects) else Rejects(quarantine)
    return _read_items(Path(path), row_errors(on_error, rejects))


def write_items(path: Path | str, items: Iterable[Item]) -> int:
    """Writes an items file, streamed and atomically, and returns the number of items.

    Raises:
        ConfigError: the suffix is none that is known.
        DataError: an item has no id, or a field or feature of the wrong type.
    """
    return _write(Path(path), _checked(items, _checked_item), ITEMS)


def _checked_item(item: Item) -> dict[str, Any]:
    record = item_record(item)
    item_from_record(record, Item)
    return record


def _checked(values: Iterable[Any], record: Callable[[Any], dict[str, Any]]) -> Iterator[Any]:
    for place, value in enumerate(values):
        try:
            yield record(value)
        except ValueError as error:
            raise DataError(f"number {place + 1} cannot be written: {error}") from None


def _write(path: Path, records: Iterator[dict[str, Any]], schema: Any) -> int:  # noqa: ANN401
    count = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal count
        for record in records:
            count += 1
            yield record

    if path.suffix == ".parquet":
        write_parquet(path, counted(), schema)
    elif path.name.endswith(_JSON):
        with writing(path) as file:
            for record in counted():
                text = json.dumps(record, ensure_ascii=False, allow_nan=False)
                file.write(text.encode("utf-8") + b"\n")
    else:
        raise ConfigError(f"expected a name that ends in {', '.join(_SUFFIXES)}, not {path.name}")
    return count


def read_files(shards: Sequence[Path], lookup: Lookup, reject: Reject) -> Iterator[Slate]:
    """Yields the slates of files; `read_slates` is for everybody, this for one file of several."""
    for path in shards:
        required = ("slate_id", "user_id", "history", "candidates")
        for line, text, record in _records(path, reject, SLATE_KEYS, required):
            try:
                slate = slate_from_record(record, lookup)
            except ValueError as error:
                reject(path, line, str(error), text or repr(record))
                continue
            yield slate


def _records(
    path: Path, reject: Reject, known: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[int, str, Any]]:
    """Yields (line or row, its text or nothing, the record)."""
    if path.suffix == ".parquet":
        for row, record in parquet_records(path, reject, known=known, required=required):
            yield row, "", record
        return
    for line, text in text_lines(path, reject):
        try:
            record = json_value(text)
        except ValueError as error:
            reject(path, line, str(error), text)
        else:
            yield line, text, record


def slate_files(path: Path) -> list[Path]:
    """Returns the files of slates that a path means, in the order they are read."""
    if path.is_dir():
        shards = [p for p in sorted(path.iterdir()) if _is_shard(p)]
        if not shards:
            raise DataError(f"no slates here; expected {', '.join(_SUFFIXES)} files", path=path)
        return shards
    if not path.is_file():
        raise DataError("no such file or folder; expected slates here", path=path)
    if not path.name.endswith(_SUFFIXES):
        raise DataError(f"slates are read from {', '.join(_SUFFIXES)} files", path=path)
    return [path]


def _is_shard(path: Path) -> bool:
    stem = path.name.split(".")[0]
    hidden = path.name.startswith((".", "_"))
    return path.name.endswith(_SUFFIXES) and not hidden and stem not in _NOT_SLATES


def item_lookup(path: Path, items: _Items | None, reject: Reject) -> Lookup:
    """Returns the function that finds an item's text; it reads the file when first called."""
    found: Mapping[str, Item] | None = items if isinstance(items, Mapping) else None
    file = Path(items) if isinstance(items, Path | str) else items_beside(path)
    where = "the given items" if isinstance(items, Mapping) else str(file)

    def lookup(item_id: str) -> Item:
        nonlocal found
        if found is None:
            if file is None:
                raise ValueError(
                    f"item {item_id!r} is named by id alone, but no items file was given and "
                    "no items.jsonl or items.parquet lies beside the slates"
                )
            found = _read_items(file, reject)
        if item_id not in found:
            raise ValueError(f"item id {item_id!r} is not in {where}")
        return found[item_id]

    return lookup


def items_beside(path: Path) -> Path | None:
    """Returns the items file in a folder of shards or beside slates, None if there is none."""
    folders = (path, path.parent) if path.is_dir() else (path.parent,)
    files = (folder / f"items{suffix}" for folder in folders for suffix in _SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _read_items(path: Path, reject: Reject) -> dict[str, Item]:
    items: dict[str, Item] = {}
    if not path.is_file() or not path.name.endswith(_SUFFIXES):
        raise DataError(f"no items file; expected {', '.join(_SUFFIXES)}", path=path)
    for line, text, record in _records(path, reject, ITEM_KEYS, ("item_id", "fields")):
        try:
            if not isinstance(record, dict):
                raise ValueError('expected an object {"item_id", "fields", "features"}')
            item = item_from_record(record, _no_text)
            if item.item_id in items:
                raise ValueError(f"item id {item.item_id!r} occurs twice; name each item once")
        except ValueError as error:
            reject(path, line, str(error), text or repr(record))
            continue
        items[item.item_id] = item
    return items


def _no_text(item_id: str) -> Item:
    raise ValueError(f"item {item_id!r} has no key 'fields'; an items file must give its text")


def _impression(slate: Slate) -> Impression:
    return Impression(
        slate_id=slate.slate_id,
        user_id=slate.user_id,
        history=tuple(item.item_id for item in slate.history),
        candidates=tuple(item.item_id for item in slate.candidates),
        labels=slate.labels,
        timestamp=slate.timestamp,
    )
