"""MicroLens (https://github.com/westlake-repl/MicroLens): `*pairs.tsv` and `*titles.csv`.

A row of the pairs is a user and all videos the user met, oldest first, without times.
"""

from __future__ import annotations

from pathlib import Path

from peftrank.errors import DataError
from peftrank.formats._lines import csv_rows, text_lines
from peftrank.formats._log import (
    Log,
    LogBuilder,
    OnError,
    Rejects,
    add_item,
    row_errors,
    text_fields,
)
from peftrank.types import Item


def microlens(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns one interaction per user and video, in the row's order, and the titles.

    Raises:
        DataError: a file is missing, or a row is malformed and `on_error` is `raise`.
    """
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    titles = _only(Path(path), "*titles.csv")
    pairs = _only(Path(path), "*pairs.tsv")
    items: dict[str, Item] = {}
    for line, text, cells in csv_rows(titles, reject, columns=("item", "title")):
        try:
            if not cells["title"].strip():
                raise ValueError(f"video {cells['item']!r} has no title")
            add_item(items, cells["item"], text_fields(title=cells["title"]))
        except ValueError as error:
            reject(titles, line, str(error), text)
    log = LogBuilder(items)
    seen: set[str] = set()
    for line, text in text_lines(pairs, reject):
        user_id, _, sequence = text.partition("\t")
        videos = sequence.split()
        try:
            if not user_id or not videos:
                raise ValueError("expected a user, a tab, and video ids separated by spaces")
            if user_id in seen:
                raise ValueError(f"user {user_id!r} has a second row; expected one row a user")
            log.check_items(videos)
            for item_id in videos:
                log.add(user_id, item_id)
            seen.add(user_id)
        except ValueError as error:
            reject(pairs, line, str(error), text)
    return log.build(rejects)


def _only(path: Path, pattern: str) -> Path:
    files = sorted(path.glob(pattern))
    if len(files) != 1:
        raise DataError(f"expected one {pattern} in this folder, found {len(files)}", path=path)
    return files[0]
