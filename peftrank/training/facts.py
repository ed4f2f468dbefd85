"""What must be known of all slates of a part before the first is read for training.

Of slates in memory it is read from them, of stored ones from the columns of their files, a few
hundred rows at a time; the results are equal to the bit. Columns of other types than the package
writes, or with values that a slate must not have, are read slate by slate, which is slower and
says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peftrank.formats._parquet import SLATES
from peftrank.formats._stored import StoredSlates
from peftrank.types import Slate

_COLUMNS = ("candidates", "labels", "weights", "tasks")


@dataclass(frozen=True)
class Facts:
    """Of the slates of a part, in their order. Places count from 0."""

    unlabelled: int | None
    """The place of the first slate without labels."""
    weighted: int | None
    """The place of the first slate with weights."""
    relevant: bool
    """Whether a candidate of any slate has a label above 0."""
    tasks: Mapping[str, bool]
    """By name of each task that occurs, whether any value is known."""
    features: Mapping[str, tuple[float, float]]
    """Mean and standard deviation of each candidate feature, where it is known."""


def facts(slates: Sequence[Slate]) -> Facts:
    """Returns the facts of a part's slates.

    Raises:
        DataError: a row that had to be read as a slate is malformed.
    """
    if isinstance(slates, StoredSlates):
        if slates not in _known:
            _known[slates] = _of_stored(slates)
        return _known[slates]
    seen = _Seen()
    seen.add(slates)
    return seen.facts()


def _of_stored(slates: StoredSlates) -> Facts:
    seen = _Seen()
    for batch in slates.columns(_COLUMNS):
        features = _plain_features(batch)
        if features is not None and _items_are_plain(batch, slates, seen):
            seen.add_columns(batch, features)
        else:
            seen.add(slates[seen.size : seen.size + batch.num_rows])
    return seen.facts()


_known: WeakKeyDictionary[StoredSlates, Facts] = WeakKeyDictionary()
"""A plan of memory asks several times."""


@dataclass
class _Moments:
    """Sums of one feature's values, shifted by the first so that squares lose no digits.

    Values are added one after another: the sums do not depend on how they came in pieces.
    """

    shift: float
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        shifted = values - self.shift
        self.count += len(values)
        self.total = _sum(self.total, shifted)
        self.squares = _sum(self.squares, shifted * shifted)

    def mean_and_deviation(self) -> tuple[float, float]:
        mean = self.total / self.count
        return self.shift + mean, math.sqrt(max(0.0, self.squares / self.count - mean * mean))


def _sum(start: float, values: np.ndarray) -> float:
    return float(np.add.accumulate(np.concatenate(([start], values)))[-1])


@dataclass
class _Seen:
    """The facts up to now."""

    size: int = 0
    unlabelled: int | None = None
    weighted: int | None = None
    relevant: bool = False
    tasks: dict[str, bool] = field(default_factory=dict)
    moments: dict[str, _Moments] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)
    """Items of the items file that are known to have no features there."""

    def facts(self) -> Facts:
        found = {name: each.mean_and_deviation() for name, each in self.moments.items()}
        return Facts(self.unlabelled, self.weighted, self.relevant, self.tasks, found)

    def add(self, slates: Iterable[Slate]) -> None:
        values: dict[str, list[float]] = {}
        for slate in slates:
            self._first("unlabelled", 0 if slate.labels is None else None)
            self._first("weighted", None if slate.weights is None else 0)
            self.relevant |= any(label > 0 for label in slate.labels or ())
            for name, numbers in slate.tasks.items():
                self._task(name, any(number is not None for number in numbers))
            for item in slate.candidates:
                for name, value in item.features.items():
                    values.setdefault(name, []).append(value)
            self.size += 1
        for name, column in values.items():
            self._feature(name, np.array(column, np.float64))

    def add_columns(self, batch: pa.RecordBatch, features: Mapping[str, pa.Array]) -> None:
        labels, weights = batch.column("labels"), batch.column("weights")
        self._first("unlabelled", _place(pc.is_null(labels)))
        self._first("weighted", _place(pc.is_valid(weights)))
        self.relevant |= bool(pc.any(pc.greater(labels.flatten(), 0.0)).as_py())
        for name, lists in _by_key(batch.column("tasks")):
            self._task(name, len(lists.flatten().drop_null()) > 0)
        for name, numbers in features.items():
            self._feature(name, numbers.to_numpy(zero_copy_only=False))
        self.size += batch.num_rows

    def _first(self, name: str, place: int | None) -> None:
        if place is not None and getattr(self, name) is None:
            setattr(self, name, self.size + place)

    def _task(self, name: str, known: bool) -> None:
        self.tasks[name] = self.tasks.get(name, False) or known

    def _feature(self, name: str, values: np.ndarray) -> None:
        self.moments.setdefault(name, _Moments(float(values[0]))).add(values)


def _plain_features(batch: pa.RecordBatch) -> dict[str, pa.Array] | None:
    """Returns the values of each candidate feature that occurs.

    None unless the columns have the types the package writes, and no number that it refuses.
    """
    if any(batch.column(name).type != SLATES.field(name).type for name in _COLUMNS):
        return None
    items = batch.column("candidates").flatten()
    features = dict(_by_key(pc.struct_field(items, "features")))
    labels = batch.column("labels").flatten()
    for numbers in (labels, *features.values()):
        if not _all(pc.fill_null(pc.is_finite(numbers), False)):
            return None
    return features if _all(pc.greater_equal(labels, 0.0)) else None


def _items_are_plain(batch: pa.RecordBatch, slates: StoredSlates, seen: _Seen) -> bool:
    """Returns whether all features of the candidates stand in the file of slates itself."""
    items = batch.column("candidates").flatten()
    by_id = items.filter(pc.is_null(pc.struct_field(items, "fields")))
    new = {*pc.struct_field(by_id, "item_id").unique().to_pylist()} - seen.items
    try:
        if any(slates.item(item_id).features for item_id in new):
            return False
    except ValueError:  # an unknown item: reading its slate says so
        return False
    seen.items |= new
    return True


def _by_key(maps: pa.Array) -> Iterator[tuple[str, pa.Array]]:
    """Yields the values of each key that occurs in a column of maps."""
    maps = maps.drop_null()
    low, high = maps.offsets[0].as_py(), maps.offsets[len(maps)].as_py()
    keys, values = maps.keys[low:high], maps.items[low:high]
    codes = keys.dictionary_encode()
    for code, name in enumerate(codes.dictionary.to_pylist()):
        yield name, values.filter(pc.equal(codes.indices, code))


def _place(flags: pa.Array) -> int | None:
    found = pc.index(flags, True).as_py()
    return None if found < 0 else found


def _all(flags: pa.Array) -> bool:
    return bool(pc.all(flags, min_count=0).as_py())
