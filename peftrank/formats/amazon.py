"""Amazon reviews: the 2018 and 2023 JSON-lines releases, and the CSV layout of MiniOneRec.

2018 (https://nijianmo.github.io/amazon): reviews with `reviewerID`, `asin`, `overall`,
`unixReviewTime`; metadata with `asin`, `title`, `category`, `brand`. 2023
(https://amazon-reviews-2023.github.io): `user_id`, `parent_asin`, `rating`, `timestamp` in
milliseconds; `parent_asin`, `title`, `main_category`, `store`. CSV: `*_info.txt` with titles and
`*_train.csv` with a history and the item that came next in each row.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftrank.errors import DataError
from peftrank.formats._json import check_characters, json_value
from peftrank.formats._lines import csv_rows, text_lines
from peftrank.formats._log import (
    QUARANTINES,
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

_JSON = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
_PARTS = ("train", "valid", "test")
_REVIEWS: dict[int, tuple[str, str, str, str]] = {
    2018: ("reviewerID", "asin", "overall", "unixReviewTime"),
    2023: ("user_id", "parent_asin", "rating", "timestamp"),
}
_METADATA: dict[int, tuple[str, str, str, str]] = {
    2018: ("asin", "title", "category", "brand"),
    2023: ("parent_asin", "title", "main_category", "store"),
}


def amazon(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns the reviews (value = stars, UTC times) and the products.

    Fields are `title`, `category` and `brand` (2023: the store), HTML entities resolved. The CSV
    layout has titles only, no times, and value 1; a user's rows are joined into one sequence.

    Args:
        path: A folder with one data set, or one of its files (reviews, `meta...` beside it; or a
            CSV file, `..._info.txt` beside it).
        on_error: What to do about a malformed row.
        rejects: Where skipped rows go.

    Raises:
        DataError: files are missing, or a row is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    if path.suffix == ".csv" or (path.is_dir() and any(path.glob("*_info.txt"))):
        return _csv_log(path, reject).build(rejects)
    return _json_log(path, reject).build(rejects)


def _json_log(path: Path, reject: Reject) -> LogBuilder:
    reviews, metadata = _json_files(path)
    items: dict[str, Item] = {}
    for file in metadata:
        for line, text in text_lines(file, reject):
            try:
                record = _object(text)
                year = _release(record, {year: names[:1] for year, names in _METADATA.items()})
                names = _METADATA[year]
                _add_product(items, *(_text(record.get(name)) for name in names))
            except (ValueError, RecursionError) as error:
                reject(file, line, str(error), text)
    log = LogBuilder(items)
    for file in reviews:
        for line, text in text_lines(file, reject):
            try:
                _add_review(log, _object(text))
            except (ValueError, RecursionError) as error:
                reject(file, line, str(error), text)
    return log


def _json_files(path: Path) -> tuple[list[Path], list[Path]]:
    folder = path if path.is_dir() else path.parent
    named = (p for p in folder.iterdir() if p.name.endswith(_JSON) and p.is_file())
    files = sorted(p for p in named if p.name.split(".")[0] not in QUARANTINES)
    metadata = [p for p in files if p.name.startswith("meta")]
    reviews = [p for p in files if not p.name.startswith("meta")]
    if path.is_file():
        reviews = [path]
        stem = path.name.split(".")[0].removesuffix("_5")
        own = [p for p in metadata if p.name.split(".")[0] == f"meta_{stem}"]
        metadata = own or metadata
    if not reviews or not metadata:
        raise DataError(
            f"expected reviews and metadata (meta...) named {', '.join(_JSON)}, or *_info.txt "
            "and *_train.csv; found "
            f"{len(reviews)} review and {len(metadata)} metadata files",
            path=path,
        )
    return reviews, metadata


def _object(text: str) -> dict[str, Any]:
    record = json_value(text)
    check_characters(text, record)
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, not {type(record).__name__}")
    return record


def _release(record: Mapping[str, Any], keys: Mapping[int, Sequence[str]]) -> int:
    # 2023 rows also have `asin` (the variant), so the newer layout is looked for first.
    for year in (2023, 2018):
        if all(key in record for key in keys[year]):
            return year
    wanted = " or ".join(" and ".join(keys[year]) for year in keys)
    raise ValueError(f"expected the keys {wanted}; the row has {', '.join(record)}")


def _text(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, list):  # a category path
        return " > ".join(_text(part) for part in value)
    return html.unescape(value).strip() if isinstance(value, str) else ""


def _add_product(
    items: dict[str, Item], item_id: str, title: str, category: str, brand: str
) -> None:
    if not title:
        raise ValueError(f"product {item_id!r} has no title")
    add_item(items, item_id, text_fields(title=title, category=category, brand=brand))


def _add_review(log: LogBuilder, record: Mapping[str, Any]) -> None:
    year = _release(record, _REVIEWS)
    user, item, rating, time = (record.get(name) for name in _REVIEWS[year])
    if not isinstance(user, str) or not isinstance(item, str):
        raise ValueError(f"user and product must be texts, not {user!r} and {item!r}")
    seconds = number(str(time), _REVIEWS[year][3]) / (1000 if year == 2023 else 1)
    log.add(user, item, seconds, number(str(rating), _REVIEWS[year][2]))


def _csv_log(path: Path, reject: Reject) -> LogBuilder:
    info, files = _csv_files(path)
    items: dict[str, Item] = {}
    for line, text in text_lines(info, reject):
        cells = text.split("\t")
        try:
            if len(cells) != 3:
                raise ValueError(f"the row has {len(cells)} tab-separated columns, expected 3")
            _add_product(items, cells[2].strip(), _text(cells[1]), "", "")
        except ValueError as error:
            reject(info, line, str(error), text)
    log = LogBuilder(items)
    columns = ("user_id", "history_item_id", "item_id")
    for file in files:
        for line, text, row in csv_rows(file, reject, columns=columns):
            try:
                history = _ids(row["history_item_id"])
                log.add_sequence(row["user_id"], history, row["item_id"].strip())
            except ValueError as error:
                reject(file, line, str(error), text)
    return log


def _csv_files(path: Path) -> tuple[Path, list[Path]]:
    folder = path if path.is_dir() else path.parent
    infos = {p.name.removesuffix("_info.txt"): p for p in sorted(folder.glob("*_info.txt"))}
    if path.is_file():
        infos = {name: p for name, p in infos.items() if path.name.startswith(f"{name}_")}
    if len(infos) != 1:
        raise DataError(
            f"expected one data set, a *_info.txt with its *.csv, found {len(infos)} "
            f"({', '.join(infos) or 'none'}); give the path of one CSV file",
            path=path,
        )
    ((name, info),) = infos.items()
    files = [path] if path.is_file() else sorted(folder.glob(f"{name}_*.csv"), key=_order)
    if not files:
        raise DataError(f"expected {name}_train.csv beside {info.name}", path=path)
    return info, files


def _order(path: Path) -> tuple[int, str]:
    parts = [place for place, part in enumerate(_PARTS) if f"_{part}" in path.name]
    return (parts[0] if parts else len(_PARTS), path.name)


def _ids(text: str) -> list[str]:
    try:
        values = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, list) or not all(isinstance(v, int | str) for v in values):
        raise ValueError(f"history_item_id is {text!r}, expected a list of ids as [1, 2]")
    return [str(value) for value in values]
