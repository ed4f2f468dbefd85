"""MIND news logs (https://msnews.github.io): `behaviors*.tsv` and `news*.tsv`.

Reads a folder that holds both (`behaviors.tsv`, or `behaviors.train.tsv` and so on), a folder of
such folders (`MINDsmall_train/`, `MINDsmall_dev/`), or one behaviors file with its news beside it.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from peftrank.errors import DataError
from peftrank.formats._json import first_twice
from peftrank.formats._lines import text_lines
from peftrank.formats._log import (
    Impression,
    Log,
    LogBuilder,
    OnError,
    Reject,
    Rejects,
    add_item,
    row_errors,
    text_fields,
)
from peftrank.types import Item

_TIME = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d{2}):(\d{2}) ([AP])M")
_PART_FILE = re.compile(r"\w+[._-](train|dev|valid|test)\.tsv", re.IGNORECASE)
_PART_FOLDER = re.compile(r"(?:MIND\w*_)?(train|dev|valid|test)", re.IGNORECASE)
_PARTS = {"train": "train", "dev": "valid", "valid": "valid", "test": "test"}


def mind(path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None) -> Log:
    """Returns the impressions as they were shown; the interactions are their clicks.

    Histories stay with their impressions (their clicks have no time). Labels are 1 for a click
    and 0 for none, or None where the file does not say (the official test part). Times are read
    as UTC. With several behaviors files, slate ids start with the part's name.

    Raises:
        DataError: a file is missing, or a row is malformed and `on_error` is `raise`.
    """
    rejects = Rejects() if rejects is None else rejects
    reject = row_errors(on_error, rejects)
    behaviors, news = _files(Path(path))
    items: dict[str, Item] = {}
    for file in news:
        _read_news(file, items, reject)
    log = LogBuilder(items)
    seen: set[str] = set()
    for file in behaviors:
        part = _part(file)
        prefix = f"{part or file.stem}-" if len(behaviors) > 1 else ""
        for line, text in text_lines(file, reject):
            try:
                impression = _impression(text, part, prefix)
                if impression.slate_id in seen:
                    raise ValueError(f"impression id {impression.slate_id!r} occurs twice")
                log.check_items((*impression.history, *impression.candidates))
            except ValueError as error:
                reject(file, line, str(error), text)
                continue
            seen.add(impression.slate_id)
            _add(log, impression)
    return log.build(rejects)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    if path.is_file():
        twin = path.with_name(path.name.replace("behaviors", "news", 1))
        news = [twin] if twin != path and twin.is_file() else sorted(path.parent.glob("news*.tsv"))
        behaviors = [path]
    else:
        pattern = "" if any(path.glob("behaviors*.tsv")) else "*/"
        behaviors = sorted(path.glob(f"{pattern}behaviors*.tsv"), key=_order)
        news = sorted(path.glob(f"{pattern}news*.tsv"), key=_order)
    if not behaviors or not news:
        raise DataError(
            "expected behaviors*.tsv and news*.tsv here, or in folders one level below", path=path
        )
    return behaviors, news


def _order(path: Path) -> tuple[int, str]:
    # Train first: where two parts describe one article differently, the train part's row stays.
    part = _part(path)
    return (("train", "valid", "test").index(part) if part else 3, str(path))


def _part(path: Path) -> str:
    for pattern, name in ((_PART_FILE, path.name), (_PART_FOLDER, path.parent.name)):
        if match := pattern.fullmatch(name):
            return _PARTS[match[1].lower()]
    return ""


def _read_news(path: Path, items: dict[str, Item], reject: Reject) -> None:
    for line, text in text_lines(path, reject):
        cells = text.split("\t")
        try:
            if len(cells) != 8:
                raise ValueError(f"the row has {len(cells)} tab-separated columns, expected 8")
            if not cells[3].strip():
                raise ValueError(f"news id {cells[0]!r} has no title")
            fields = text_fields(
                title=cells[3], category=cells[1], subcategory=cells[2], abstract=cells[4]
            )
            add_item(items, cells[0], fields)
        except ValueError as error:
            reject(path, line, str(error), text)


def _impression(text: str, part: str, prefix: str) -> Impression:
    cells = text.split("\t")
    if len(cells) != 5:
        raise ValueError(f"the row has {len(cells)} tab-separated columns, expected 5")
    slate_id, user_id, time, history, shown = cells
    if not slate_id or not user_id:
        raise ValueError("the impression id or the user id is empty")
    candidates, labels = _shown(shown.split())
    return Impression(
        # The ids of some releases name their part already.
        slate_id=slate_id if slate_id.startswith(part or prefix) else prefix + slate_id,
        user_id=user_id,
        history=tuple(history.split()),
        candidates=candidates,
        labels=labels,
        timestamp=_seconds(time),
        part=part,
    )


def _shown(tokens: list[str]) -> tuple[tuple[str, ...], tuple[float, ...] | None]:
    if not tokens:
        raise ValueError("the impression shows no articles")
    clicked = [token[-2:] in ("-0", "-1") for token in tokens]
    if any(clicked) and not all(clicked):
        token = tokens[clicked.index(False)]
        raise ValueError(f"{token!r} has no -0 or -1 at its end, though others of the row have")
    labels = tuple(float(token[-1]) for token in tokens) if all(clicked) else None
    candidates = tuple(token[:-2] for token in tokens) if labels else tuple(tokens)
    if (twice := first_twice(candidates)) is not None:
        raise ValueError(f"the impression shows {twice!r} twice")
    return candidates, labels


@lru_cache(maxsize=4096)
def _seconds(text: str) -> float:
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"time is {text!r}, expected month/day/year hour:minute:second AM or PM")
    month, day, year, hour, minute, second = (int(group) for group in match.groups()[:6])
    if not 1 <= hour <= 12:
        raise ValueError(f"time is {text!r}: the hour must be 1 to 12")
    hour = hour % 12 + (12 if match[7] == "P" else 0)
    return datetime(year, month, day, hour, minute, second, tzinfo=UTC).timestamp()


def _add(log: LogBuilder, impression: Impression) -> None:
    log.impressions.append(impression)
    if impression.labels is None or impression.timestamp is None:
        return
    for item_id, label in zip(impression.candidates, impression.labels, strict=True):
        if label > 0:
            log.add(impression.user_id, item_id, impression.timestamp)
