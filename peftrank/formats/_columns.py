"""Sampled lists as Arrow columns, without a Python object for each slate and item.

The rows are those that `write_slates(..., by_id=True)` would write. What its checks refuse cannot
occur: candidates of a sampled list differ, and its labels are finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from peftrank._lists import Ints, Lists
from peftrank.formats._parquet import SLATES, write_columns

_CANDIDATES = SLATES.field("candidates").type
_ITEM = _CANDIDATES.value_type
_FEATURES = _ITEM.field("features").type
_DIGITS = 6


def slate_columns(
    lists: Lists,
    item_ids: pa.Array,
    user_ids: pa.Array,
    names: Sequence[str],
    values: np.ndarray,
    *,
    rated: bool,
    domain: str | None,
) -> pa.Table:
    """Returns lists as rows of a file of slates; items by id, candidates with their features.

    Args:
        lists: S lists with M candidates.
        item_ids: Of each item code.
        user_ids: Of each user code.
        names: The F features.
        values: (M, F), NaN = unknown.
        rated: Whether to keep what users gave history items.
        domain: Of the slates.
    """
    size = len(lists)
    history = _items(item_ids, lists.history, pa.nulls(len(lists.history), _FEATURES))
    candidates = _items(item_ids, lists.candidate, _features(names, values))
    past, shown = _offsets(lists.history_start), _offsets(lists.candidate_start)
    feedback = pa.nulls(size, SLATES.field("history_feedback").type)
    if rated:
        feedback = pa.ListArray.from_arrays(past, pa.array(lists.feedback, pa.float64()))
    nothing = pa.array([], pa.string())
    columns = {
        "slate_id": pa.array(lists.slate_ids, pa.string()),
        "user_id": user_ids.take(pa.array(lists.user)),
        "history": pa.ListArray.from_arrays(past, history),
        "candidates": pa.ListArray.from_arrays(shown, candidates),
        "labels": pa.ListArray.from_arrays(shown, pa.array(lists.label)),
        "history_feedback": feedback,
        "timestamp": pa.array(lists.time, mask=np.isnan(lists.time)),
        "domain": pa.nulls(size, pa.string()) if domain is None else pa.repeat(domain, size),
        "context": pa.MapArray.from_arrays(
            pa.array(np.zeros(size + 1, np.int32)), nothing, nothing
        ),
    }
    absent = {f.name: pa.nulls(size, f.type) for f in SLATES if f.name not in columns}
    return pa.Table.from_pydict(columns | absent, schema=SLATES)


def write_shards(paths: Sequence[Path], tables: Iterator[pa.Table], size: int) -> None:
    """Writes tables of slates to files of `size` rows, and what is left to the last one."""
    rest: list[pa.Table] = []

    def shard() -> Iterator[pa.Table]:
        room = size
        while room and (table := rest.pop() if rest else next(tables, None)) is not None:
            if table.num_rows > room:
                rest.append(table.slice(room))
            yield table.slice(0, room)
            room -= min(room, table.num_rows)

    for path in paths:
        write_columns(path, shard(), SLATES)


def rounded(values: np.ndarray) -> np.ndarray:
    """Returns float32 values as Python's `round` to six digits gives them, as float64."""
    exact = np.asarray(values, np.float64)
    # From here on a float32 is a whole number.
    return np.where(np.abs(exact) < 2**23, np.round(exact, _DIGITS), exact)


def _items(item_ids: pa.Array, codes: Ints, features: pa.Array) -> pa.Array:
    fields = pa.nulls(len(codes), _ITEM.field("fields").type)
    return pa.StructArray.from_arrays(
        [item_ids.take(pa.array(codes)), fields, features], fields=list(_ITEM)
    )


def _features(names: Sequence[str], values: np.ndarray) -> pa.Array:
    """Returns a map of each row's known values; null where none is known."""
    known = ~np.isnan(values)
    count = known.sum(axis=1)
    if not count.any():
        return pa.nulls(len(values), _FEATURES)
    row, column = np.nonzero(known)
    keys = pa.array(names, pa.string()).take(pa.array(column))
    start = np.concatenate(([0], np.cumsum(count))).astype(np.int32)
    # Arrow reads a null from the offset of the row it begins.
    offsets = pa.array(start, mask=np.append(count == 0, False))
    return pa.MapArray.from_arrays(offsets, keys, pa.array(rounded(values)[row, column]))


def _offsets(start: Ints) -> pa.Array:
    return pa.array(start.astype(np.int32))
