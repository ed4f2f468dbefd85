"""MovieLens ratings (https://grouplens.org/datasets/movielens): 100K, 1M/10M and latest layouts.

The layout is told by the files: `u.data`, `ratings.dat` or `ratings.csv` in the folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from peftrank.errors import DataError
from peftrank.formats._lines import csv_rows, text_lines
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

_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
_Row = tuple[int, str, Sequence[str]]


def movielens(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns the ratings (value = rating, UTC times) and the films (`title`, `genres`).

    The year stays in the title, as the files have it.

    Raises:
        DataError: no known layout, or a row is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    layouts = {"u.data": _read_100k, "ratings.dat": _read_dat, "ratings.csv": _read_csv}
    for name, read in layouts.items():
        if (path / name).is_file():
            return read(path, reject).build(rejects)
    raise DataError(f"expected one of {', '.join(layouts)} in this folder", path=path)


def _read_100k(path: Path, reject: Reject) -> LogBuilder:
    names = _genre_names(path / "u.genre", reject)
    items: dict[str, Item] = {}
    file = path / "u.item"
    for line, text in text_lines(file, reject, encodings=("latin-1",)):
        cells = text.split("|")
        try:
            if len(cells) != 5 + len(names):
                raise ValueError(f"the row has {len(cells)} columns, expected {5 + len(names)}")
            if not set(cells[5:]) <= {"0", "1"}:
                raise ValueError("the genre columns must hold 0 or 1")
            chosen = [n for n, flag in zip(names, cells[5:], strict=True) if flag == "1"]
            genres = ", ".join(name for name in chosen if name != "unknown")
            _add_film(items, cells[0], cells[1], genres)
        except ValueError as error:
            reject(file, line, str(error), text)
    return _ratings(path / "u.data", _split(path / "u.data", "\t", reject), items, reject)


def _read_dat(path: Path, reject: Reject) -> LogBuilder:
    items: dict[str, Item] = {}
    file = path / "movies.dat"
    # 1M is latin-1, 10M is UTF-8; both are read right this way.
    for line, text in text_lines(file, reject, encodings=("utf-8", "latin-1")):
        cells = text.split("::")
        try:
            if len(cells) != 3:
                raise ValueError(f"the row has {len(cells)} columns separated by ::, expected 3")
            _add_film(items, cells[0], cells[1], _genres(cells[2]))
        except ValueError as error:
            reject(file, line, str(error), text)
    return _ratings(path / "ratings.dat", _split(path / "ratings.dat", "::", reject), items, reject)


def _read_csv(path: Path, reject: Reject) -> LogBuilder:
    items: dict[str, Item] = {}
    file = path / "movies.csv"
    for line, text, cells in csv_rows(file, reject, columns=("movieId", "title", "genres")):
        try:
            _add_film(items, cells["movieId"], cells["title"], _genres(cells["genres"]))
        except ValueError as error:
            reject(file, line, str(error), text)
    file = path / "ratings.csv"
    columns = ("userId", "movieId", "rating", "timestamp")
    rows: Iterator[_Row] = (
        (line, text, [cells[column] for column in columns])
        for line, text, cells in csv_rows(file, reject, columns=columns)
    )
    return _ratings(file, rows, items, reject)


def _genre_names(path: Path, reject: Reject) -> tuple[str, ...]:
    if not path.is_file():
        return _GENRES
    return tuple(text.split("|")[0] for _, text in text_lines(path, reject))


def _genres(text: str) -> str:
    return "" if text == "(no genres listed)" else ", ".join(text.split("|"))


def _add_film(items: dict[str, Item], item_id: str, title: str, genres: str) -> None:
    if not title.strip():
        raise ValueError(f"film {item_id!r} has no title")
    add_item(items, item_id, text_fields(title=title, genres=genres))


def _split(path: Path, separator: str, reject: Reject) -> Iterator[_Row]:
    for line, text in text_lines(path, reject):
        yield line, text, text.split(separator)


def _ratings(
    path: Path, rows: Iterator[_Row], items: dict[str, Item], reject: Reject
) -> LogBuilder:
    log = LogBuilder(items)
    for line, text, cells in rows:
        try:
            if len(cells) != 4:
                raise ValueError(
                    f"the row has {len(cells)} columns, expected user, film, rating, timestamp"
                )
            user_id, item_id, rating, timestamp = cells
            log.add(user_id, item_id, number(timestamp, "timestamp"), number(rating, "rating"))
        except ValueError as error:
            reject(path, line, str(error), text)
    return log
