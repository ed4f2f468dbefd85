"""Slates that stay in their Parquet files: a sequence that reads a slate when it is asked for.

What is held is the files' layout, a few row groups that were read last, and the items file if
slates name items by id. So memory does not grow with the number of slates.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from peftrank._lists import Ints
from peftrank.errors import DataError
from peftrank.formats._log import Rejects, row_errors
from peftrank.formats._parquet import SLATES, check_columns, damaged, rows_of
from peftrank.formats._record import REQUIRED, SLATE_KEYS, slate_from_record
from peftrank.formats.slates import item_lookup, items_beside, slate_files
from peftrank.types import Item, Slate

CACHE = 64 * 2**20
"""Bytes of row groups that are kept; one, at least."""
LARGEST_GROUP = 256 * 2**20
"""Bytes of a row group, before compression: it is read whole for one of its slates."""
_OPEN = 8
"""Files open at once: the layout of one of 50,000 slates takes eight megabytes."""
_PIECE = 512
"""Slates in memory at once where all are read one after another."""
_SCANNED = 2048
"""Rows of columns in memory at once."""
_RAISE = row_errors("raise", Rejects())


def stored_slates(path: Path, items: Path | None = None) -> StoredSlates | None:
    """Returns the slates of a Parquet file or a folder of them; None if others are among them.

    Args:
        path: The file or folder, see `read_slates`.
        items: The items file, if none lies beside the slates.

    Raises:
        DataError: a file is missing or damaged, or a row group is too large.
    """
    files = slate_files(path)
    if any(file.suffix != ".parquet" for file in files):
        return None
    return StoredSlates(_Files(files, items or items_beside(path)))


class StoredSlates(Sequence[Slate]):
    """Slates of Parquet files, in the order of the files or as chosen. For one thread at a time.

    Reading one raises DataError if its row is malformed.
    """

    def __init__(
        self,
        files: _Files,
        rows: range | Ints | None = None,
        changes: tuple[Callable[[Slate], Slate], ...] = (),
        held: Mapping[int, Slate] | None = None,
    ) -> None:
        """See `stored_slates`, `choose`, `changed` and `hold`."""
        self._files = files
        self._rows = range(len(files)) if rows is None else rows
        self._changes = changes
        self._held = held or {}

    def __len__(self) -> int:
        """Returns the number of slates."""
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Slate: ...
    @overload
    def __getitem__(self, index: slice) -> StoredSlates: ...
    def __getitem__(self, index: int | slice) -> Slate | StoredSlates:
        """Returns a slate, or several, which are read when they are used."""
        if isinstance(index, slice):
            return StoredSlates(self._files, self._rows[index], self._changes, self._held)
        return self._read(np.array([self._rows[index]]))[0]

    def __iter__(self) -> Iterator[Slate]:
        """Yields the slates, a few hundred in memory at once."""
        for first in range(0, len(self), _PIECE):
            yield from self._read(np.asarray(self._rows[first : first + _PIECE]))

    def choose(self, places: Ints) -> StoredSlates:
        """Returns the slates at the given places, in that order."""
        rows = np.asarray(self._rows)[places]
        return StoredSlates(self._files, rows, self._changes, self._held)

    def changed(self, change: Callable[[Slate], Slate]) -> StoredSlates:
        """Returns the same slates, each as `change` makes it of what it was."""
        return StoredSlates(self._files, self._rows, (*self._changes, change))

    def hold(self, part: slice) -> StoredSlates:
        """Returns the same slates, of which those of a part are read now and kept as they are."""
        rows = np.asarray(self._rows[part])
        held = dict(zip(rows.tolist(), self._read(rows), strict=True))
        return StoredSlates(self._files, self._rows, self._changes, held)

    def columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields columns of all rows of the files, a few thousand rows at a time.

        A name that a file lacks is a column of nulls.
        """
        return self._files.columns(names)

    def item(self, item_id: str) -> Item:
        """Returns an item of the items file; raises ValueError if it is not in it."""
        return self._files.item(item_id)

    def files_fingerprint(self) -> str:
        """Returns a SHA-256 over the files, whichever of their slates are chosen, and the items."""
        return self._files.fingerprint()

    def _read(self, rows: Ints) -> list[Slate]:
        if all(row in self._held for row in rows.tolist()):
            return [self._held[row] for row in rows.tolist()]
        slates = self._files.read(rows)
        for change in self._changes:
            slates = [change(slate) for slate in slates]
        return slates


class _Files:
    """Parquet files of slates: where each row lies, and the row groups read last."""

    def __init__(self, files: Sequence[Path], items: Path | None) -> None:
        self._paths, self._items = list(files), items
        self.item = item_lookup(self._paths[0], items, _RAISE)
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._read_last: OrderedDict[int, pa.RecordBatch] = OrderedDict()
        self._stamps: list[tuple[int, int, int]] = []
        groups: list[tuple[int, int, int]] = []
        for number, path in enumerate(self._paths):
            with damaged(path):
                self._stamps.append(_stamp(path))
                layout = pq.read_metadata(path)
                check_columns(path, layout.schema.to_arrow_schema().names, SLATE_KEYS, REQUIRED)
                for place in range(layout.num_row_groups):
                    group = layout.row_group(place)
                    _check_size(path, group)
                    groups.append((number, place, group.num_rows))
        table = np.array(groups, np.int64).reshape(-1, 3)
        self._file, self._group = table[:, 0], table[:, 1]
        self._start = np.concatenate(([0], np.cumsum(table[:, 2])))
        """Of each row group, the row that it begins at; last, how many rows there are."""

    def __len__(self) -> int:
        return int(self._start[-1])

    def read(self, rows: Ints) -> list[Slate]:
        """Returns the slates of rows, in their order; each row group is read once."""
        groups = np.searchsorted(self._start, rows, side="right") - 1
        found: list[Slate | None] = [None] * len(rows)
        for group in np.unique(groups).tolist():
            batch = self._batch(group)
            for place in np.flatnonzero(groups == group).tolist():
                found[place] = self._slate(batch, group, int(rows[place] - self._start[group]))
        return [slate for slate in found if slate is not None]

    def _slate(self, batch: pa.RecordBatch, group: int, place: int) -> Slate:
        number = int(self._file[group])
        path = self._paths[number]
        first = self._start[np.searchsorted(self._file, number)]
        row = int(self._start[group] - first) + place
        (record,) = rows_of(batch.slice(place, 1), path, row, _RAISE)
        assert record is not None  # a bad row has raised
        try:
            return slate_from_record(record, self.item)
        except ValueError as error:
            raise DataError(str(error), path=path, line=row + 1) from None

    def _batch(self, group: int) -> pa.RecordBatch:
        if group not in self._read_last:
            number = int(self._file[group])
            with damaged(self._paths[number]):
                table = self._parquet(number).read_row_group(
                    int(self._group[group]), use_threads=False
                )
                self._read_last[group] = table.combine_chunks().to_batches()[0]
            held = sum(batch.nbytes for batch in self._read_last.values())
            while held > CACHE and len(self._read_last) > 1:
                held -= self._read_last.popitem(last=False)[1].nbytes
        self._read_last.move_to_end(group)
        return self._read_last[group]

    def _parquet(self, number: int) -> pq.ParquetFile:
        if number not in self._open:
            self._check_same(number)
            self._open[number] = pq.ParquetFile(self._paths[number])
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def _check_same(self, number: int) -> None:
        if _stamp(self._paths[number]) != self._stamps[number]:
            raise DataError(
                "the file changed while its slates were in use. Let nothing write to it, and "
                "start again.",
                path=self._paths[number],
            )

    def columns(self, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
        for number, path in enumerate(self._paths):
            with damaged(path), pq.ParquetFile(path) as file:
                self._check_same(number)
                there = [name for name in names if name in file.schema_arrow.names]
                for batch in file.iter_batches(_SCANNED, columns=there, use_threads=False):
                    absent = {
                        name: pa.nulls(batch.num_rows, SLATES.field(name).type)
                        for name in names
                        if name not in there
                    }
                    found = {name: batch.column(name) for name in there}
                    yield pa.RecordBatch.from_pydict(found | absent)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in (*self._paths, *([self._items] if self._items else ())):
            with damaged(path), path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    about = path.stat()
    return about.st_ino, about.st_size, about.st_mtime_ns


def _check_size(path: Path, group: pq.RowGroupMetaData) -> None:
    if group.total_byte_size > LARGEST_GROUP:
        raise DataError(
            f"a row group of {group.num_rows:,} slates takes {group.total_byte_size / 2**20:,.0f} "
            f"MiB; slates are read by row group, of at most {LARGEST_GROUP / 2**20:.0f} MiB. Write "
            "the file again with smaller ones (pyarrow: row_group_size=128; Python: "
            "write_slates(NEW, read_slates(OLD)) of peftrank.formats.slates).",
            path=path,
        )
