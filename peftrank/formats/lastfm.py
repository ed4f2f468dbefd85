"""HetRec 2011 Last.fm (https://grouplens.org/datasets/hetrec-2011): people recommended to people.

The items are the people themselves. They have no names, so each is described by the artists
played most and the tags given most. Friendships are the interactions and never part of a
description: a text that named friends would give the answer away.
"""

from __future__ import annotations

from collections import Counter, defaultdict
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
    number,
    row_errors,
    text_fields,
)
from peftrank.types import Item

_Counts = dict[str, Counter[str]]
# Names are UTF-8 in most rows and latin-1 in the rest.
_ENCODINGS = ("utf-8", "latin-1")


def lastfm(
    path: Path,
    *,
    on_error: OnError = "raise",
    rejects: Rejects | None = None,
    artists: int = 10,
    tags: int = 10,
) -> Log:
    """Returns the friendships as interactions (no times) and the people as items.

    A person's fields are `artists`, `tags` and `about`, a sentence made of both. Each row of
    `user_friends.dat` is one interaction; the files list a friendship once in each direction.
    The dates of the tags (some lie in 1956) are not used.

    Args:
        path: The folder of the `.dat` files.
        on_error: What to do about a malformed row.
        rejects: Where skipped rows go.
        artists: At most this many artists describe a person, most played first.
        tags: At most this many tags describe a person, most used first.

    Raises:
        DataError: a file is missing, or a row is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    played = _counted(path / "user_artists.dat", path / "artists.dat", "artistID", reject)
    tagged = _counted(path / "user_taggedartists.dat", path / "tags.dat", "tagID", reject)
    log = LogBuilder(_people(played, tagged, artists, tags))
    file = path / "user_friends.dat"
    for line, text, cells in _rows(file, ("userID", "friendID"), reject):
        try:
            if cells[0] == cells[1]:
                raise ValueError(f"person {cells[0]!r} is their own friend")
            log.check_items(cells)
            log.add(cells[0], cells[1])
        except ValueError as error:
            reject(file, line, str(error), text)
    return log.build(rejects)


def _rows(
    path: Path, columns: tuple[str, ...], reject: Reject
) -> Iterator[tuple[int, str, list[str]]]:
    lines = text_lines(path, reject, encodings=_ENCODINGS)
    _, text = next(lines, (1, ""))
    header = text.split("\t")
    if not set(columns) <= set(header):
        raise DataError(
            f"the header must have {', '.join(columns)}; it is {text!r}", path=path, line=1
        )
    chosen = [header.index(column) for column in columns]
    for line, text in lines:
        cells = text.split("\t")
        if len(cells) == len(header) and all(cells[i].strip() for i in chosen):
            yield line, text, [cells[i] for i in chosen]
        else:
            reject(path, line, f"expected {len(header)} columns, {', '.join(columns)} filled", text)


def _names(path: Path, reject: Reject) -> dict[str, str]:
    columns = ("id", "name") if path.name == "artists.dat" else ("tagID", "tagValue")
    names: dict[str, str] = {}
    for line, text, (key, name) in _rows(path, columns, reject):
        if names.setdefault(key, name.strip()) != name.strip():
            reject(path, line, f"id {key!r} already has the name {names[key]!r}", text)
    return names


def _counted(path: Path, names_path: Path, column: str, reject: Reject) -> _Counts:
    """Returns user -> name -> plays (where the file has a weight) or number of rows."""
    names = _names(names_path, reject)
    weighted = column == "artistID"
    columns = ("userID", column, "weight") if weighted else ("userID", column)
    counts: _Counts = defaultdict(Counter)
    for line, text, cells in _rows(path, columns, reject):
        try:
            if cells[1] not in names:
                raise ValueError(f"{column} {cells[1]!r} is not in {names_path.name}")
            weight = number(cells[2], "weight") if weighted else 1.0
            if weight <= 0:
                raise ValueError(f"weight is {cells[2]}, expected more than 0")
            counts[cells[0]][names[cells[1]]] += int(weight)
        except ValueError as error:
            reject(path, line, str(error), text)
    return counts


def _people(played: _Counts, tagged: _Counts, artists: int, tags: int) -> dict[str, Item]:
    people = {}
    for user_id in (*played, *(user_id for user_id in tagged if user_id not in played)):
        names = _top(played.get(user_id, Counter()), artists)
        words = _top(tagged.get(user_id, Counter()), tags)
        about = [f"Listens to {names}." if names else "", f"Tags: {words}." if words else ""]
        fields = text_fields(about=" ".join(about), artists=names, tags=words)
        if fields:
            people[user_id] = Item(user_id, fields)
    return people


def _top(counts: Counter[str], k: int) -> str:
    # By count, then by name: the same text whatever order the rows have.
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(name for name, _ in ordered[:k])
