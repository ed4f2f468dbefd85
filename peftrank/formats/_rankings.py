"""Rankings on disk: JSON lines, and TREC run and qrels files for outside tools.

TREC's columns are separated by spaces (https://trec.nist.gov), so ids must not hold any.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from peftrank.errors import ConfigError, DataError
from peftrank.files import writing
from peftrank.formats._lines import text_lines
from peftrank.formats._log import OnError, Rejects, number, row_errors
from peftrank.types import RankedList, Slate

_SPACE = re.compile(r"[\s\ufeff]")  # a byte-order mark, too, would not be read back


def write_rankings(path: Path, ranked: Iterable[RankedList], *, tag: str = "peftrank") -> int:
    """Writes rankings, streamed and atomically, and returns how many.

    Args:
        path: `.jsonl` or `.jsonl.gz`: an object per slate with `slate_id`, `item_ids` and
            `scores`, best first. `.run`: a TREC run.
        ranked: The rankings.
        tag: The run's name, in the last column of a TREC run.

    Raises:
        ConfigError: the suffix is neither.
        DataError: a score is not finite, or an id cannot be written as TREC.
    """
    path = Path(path)
    if path.suffix == ".run":
        lines = _run_lines(ranked, _word(tag, "tag"))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        lines = _json_lines(ranked)
    else:
        raise ConfigError(f"rankings are written as .jsonl, .jsonl.gz or .run, not {path.name}")
    count = 0
    with writing(path) as file:
        for text in lines:
            file.write(text.encode("utf-8"))
            count += 1
    return count


def write_qrels(path: Path, slates: Iterable[Slate]) -> int:
    """Writes the labels as TREC qrels, streamed and atomically, and returns how many slates.

    Raises:
        DataError: a slate has no labels, a label is no whole number, or an id holds white space.
    """
    count = 0
    with writing(Path(path)) as file:
        for slate in slates:
            file.write(_qrels(slate).encode("utf-8"))
            count += 1
    return count


def read_run(
    path: Path, *, on_error: OnError = "raise", rejects: Rejects | None = None
) -> list[RankedList]:
    """Returns the rankings of a TREC run, in the order in which their slates first occur.

    Candidates are ordered by score, best first, equal scores by the rank column, then by line.

    Raises:
        DataError: a line is malformed and `on_error` is `raise`.
    """
    path = Path(path)
    reject = row_errors(on_error, Rejects() if rejects is None else rejects)
    slates: dict[str, dict[str, tuple[float, float]]] = {}
    for line, text in text_lines(path, reject):
        try:
            cells = text.split()
            if len(cells) != 6:
                raise ValueError(
                    f"the line has {len(cells)} columns, expected: slate Q0 item rank score tag"
                )
            slate_id, _, item_id, rank, score, _ = cells
            order = (-number(score, "score"), number(rank, "rank"))
            if item_id in slates.get(slate_id, ()):
                raise ValueError(f"item {item_id!r} occurs twice in slate {slate_id!r}")
            slates.setdefault(slate_id, {})[item_id] = order
        except ValueError as error:
            reject(path, line, str(error), text)
    return [_ranked(slate_id, rows) for slate_id, rows in slates.items()]


def _ranked(slate_id: str, rows: dict[str, tuple[float, float]]) -> RankedList:
    ordered = sorted(rows.items(), key=lambda pair: pair[1])
    item_ids = tuple(item_id for item_id, _ in ordered)
    return RankedList(slate_id, item_ids, tuple(0.0 - order[0] for _, order in ordered))


def _json_lines(ranked: Iterable[RankedList]) -> Iterator[str]:
    for row in ranked:
        _check(row)
        record = {
            "slate_id": row.slate_id,
            "item_ids": list(row.item_ids),
            "scores": [float(score) for score in row.scores],
        }
        yield json.dumps(record, ensure_ascii=False) + "\n"


def _run_lines(ranked: Iterable[RankedList], tag: str) -> Iterator[str]:
    for row in ranked:
        _check(row)
        slate_id = _word(row.slate_id, "slate id")
        pairs = enumerate(zip(row.item_ids, row.scores, strict=True), 1)
        yield "".join(
            f"{slate_id} Q0 {_word(item_id, 'item id')} {rank} {float(score)!r} {tag}\n"
            for rank, (item_id, score) in pairs
        )


def _qrels(slate: Slate) -> str:
    if slate.labels is None:
        raise DataError(f"slate {slate.slate_id!r} has no labels; qrels are made of labels")
    slate_id = _word(slate.slate_id, "slate id")
    lines = []
    for item, label in zip(slate.candidates, slate.labels, strict=True):
        if label != int(label):
            raise DataError(
                f"slate {slate.slate_id!r}: label {label} is no whole number, as qrels need; "
                "multiply or round the labels first"
            )
        lines.append(f"{slate_id} 0 {_word(item.item_id, 'item id')} {int(label)}\n")
    return "".join(lines)


def _check(row: RankedList) -> None:
    if len(row.item_ids) != len(row.scores):
        raise DataError(
            f"slate {row.slate_id!r}: {len(row.scores)} scores for {len(row.item_ids)} items"
        )
    for item_id, score in zip(row.item_ids, row.scores, strict=True):
        if not math.isfinite(score):
            raise DataError(f"slate {row.slate_id!r}: the score of {item_id!r} is {score}")


def _word(text: str, name: str) -> str:
    if not text or _SPACE.search(text):
        raise DataError(
            f"{name} {text!r} is empty or holds white space, which a TREC file cannot; "
            "write .jsonl instead"
        )
    return text
