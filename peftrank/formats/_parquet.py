"""Slate and item records in Parquet files, in batches. Knows the columns, not the rules.

Rows written by other tools are read too: `fields`, `features` and `context` may be maps or
structs, and items plain ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from peftrank.errors import DataError
from peftrank.files import replacing
from peftrank.formats._json import unique_keys
from peftrank.formats._log import Reject

_ROWS = 512
"""Rows per record batch, so per piece in memory."""
_GROUP = 128
"""Rows of a row group that is written: what is read for one slate (`_stored.py`)."""
_MAPS = ("fields", "features", "context", "tasks")
_ITEM = pa.struct(
    [
        ("item_id", pa.string()),
        ("fields", pa.map_(pa.string(), pa.string())),
        ("features", pa.map_(pa.string(), pa.float64())),
    ]
)
ITEMS = pa.schema(list(_ITEM))
SLATES = pa.schema(
    [
        ("slate_id", pa.string()),
        ("user_id", pa.string()),
        ("history", pa.list_(_ITEM)),
        ("candidates", pa.list_(_ITEM)),
        ("labels", pa.list_(pa.float64())),
        ("history_feedback", pa.list_(pa.float64())),
        ("timestamp", pa.float64()),
        ("domain", pa.string()),
        ("context", pa.map_(pa.string(), pa.string())),
        ("weights", pa.list_(pa.float64())),
        ("tasks", pa.map_(pa.string(), pa.list_(pa.float64()))),
    ]
)


def parquet_records(
    path: Path, reject: Reject, *, known: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (1-based row, record) of a file, holding a few hundred rows at a time.

    Raises:
        DataError: the file is damaged, or its columns are not `required` plus some of `known`.
    """
    row = 0
    with damaged(path), pq.ParquetFile(path) as file:
        check_columns(path, file.schema_arrow.names, known, required)
        for batch in file.iter_batches(batch_size=_ROWS):
            for record in rows_of(batch, path, row, reject):
                row += 1
                if record is not None:
                    yield row, record


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turns an error of Arrow or the disk into a DataError that names the file."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a name
        raise DataError(f"cannot read the Parquet file: {error}", path=path) from error


def write_parquet(path: Path, records: Iterable[dict[str, Any]], schema: pa.Schema) -> None:
    """Writes records, a few hundred at a time."""
    batches = (pa.RecordBatch.from_pylist(rows, schema=schema) for rows in _batched(records))
    write_columns(path, (pa.Table.from_batches([batch]) for batch in batches), schema)


def write_columns(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Writes tables in small row groups, so that a row can be read by itself."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=_GROUP)


def _batched(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    for record in records:
        rows.append(record)
        if len(rows) == _ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


def check_columns(
    path: Path, names: Sequence[str], known: Sequence[str], required: Sequence[str]
) -> None:
    """Raises DataError unless the columns are `required` plus some of `known`."""
    unknown = [name for name in names if name not in known]
    missing = [name for name in required if name not in names]
    if unknown or missing:
        raise DataError(
            f"unknown columns: {', '.join(unknown) or 'none'}; missing: "
            f"{', '.join(missing) or 'none'}. Known columns: {', '.join(known)}",
            path=path,
        )


def rows_of(
    batch: pa.RecordBatch, path: Path, before: int, reject: Reject
) -> Iterator[dict[str, Any] | None]:
    """Yields the records of a batch with `before` rows in front of it; None for a rejected row."""
    try:
        rows = batch.to_pylist()
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        if batch.num_rows > 1:
            for place in range(batch.num_rows):
                yield from rows_of(batch.slice(place, 1), path, before + place, reject)
            return
        reason = f"a value of the row cannot be read: {error}"  # a date beyond the year 9999
        if isinstance(error, UnicodeDecodeError):
            reason = "a text of the row is not valid UTF-8"
        reject(path, before + 1, reason, "")
        yield None
        return
    for place, row in enumerate(rows, 1):
        try:
            record = {name: _unmapped(name, value) for name, value in row.items()}
        except (TypeError, ValueError) as error:
            reject(path, before + place, f"a map of the row cannot be read: {error}", repr(row))
            record = None
        yield record


def _unmapped(name: str, value: Any) -> Any:  # noqa: ANN401 - any Arrow value
    """Returns the value with maps (lists of pairs) as dicts, in nested items too."""
    if isinstance(value, list):
        if name in _MAPS and all(isinstance(pair, tuple) for pair in value):
            return unique_keys(value)
        return [_unmapped("", part) for part in value]
    if isinstance(value, dict):
        # A struct has all keys in all rows; null is how it says that one is absent.
        return {key: _unmapped(key, part) for key, part in value.items() if part is not None}
    return value
