"""Reads text files line by line in bounded memory, with line numbers for errors.

Handles gzip, a leading byte-order mark, CRLF, blank lines, invalid bytes and endless lines. Knows
nothing of what the lines hold.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, cast

from peftrank.errors import DataError
from peftrank.formats._log import Reject

LINE_BYTES = 32 * 2**20
"""A longer line is an error; it is never held in memory as a whole."""
_ESCAPED = re.compile("[\ud800-\udfff]")
_BOM = b"\xef\xbb\xbf"


def text_lines(
    path: Path, reject: Reject, *, encodings: Sequence[str] = ("utf-8",)
) -> Iterator[tuple[int, str]]:
    """Yields (1-based line number, line without its end) of each line that is not blank.

    Args:
        path: A text file; `.gz` is decompressed.
        reject: Called for a line that is too long or cannot be decoded.
        encodings: Tried in order, line by line (old files mix them).

    Raises:
        DataError: the file cannot be opened or decompressed, or `reject` raises.
    """
    for number, raw in raw_lines(path, reject):
        text = _decode(raw, encodings)
        if text is None:
            reason = f"the line is not valid {encodings[0].upper()}; convert the file to UTF-8"
            reject(path, number, reason, raw.decode("utf-8", "backslashreplace"))
        elif not text.isspace() and text:
            yield number, text


def raw_lines(path: Path, reject: Reject) -> Iterator[tuple[int, bytes]]:
    """Yields (line number, bytes without the line end), blank lines too."""
    number = 0
    try:
        with _open(path) as file:
            while raw := file.readline(LINE_BYTES + 1):
                number += 1
                if number == 1:
                    raw = raw.removeprefix(_BOM)
                if len(raw) > LINE_BYTES and not raw.endswith(b"\n"):
                    _reject_long(file, path, number, raw, reject)
                    continue
                yield number, raw.removesuffix(b"\n").removesuffix(b"\r")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read the file: {error}", path=path, line=number + 1) from error


def csv_rows(
    path: Path, reject: Reject, *, columns: Sequence[str]
) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Yields (number of the row's first line, its text, its cells by column) of a CSV with header.

    Args:
        path: The file, UTF-8.
        reject: Called for a row that is no CSV, has another number of cells, or invalid bytes.
        columns: Must be in the header; others are allowed.

    Raises:
        DataError: a column is missing, or as `text_lines`.
    """
    taken: list[tuple[int, str]] = []
    reader = csv.reader(_csv_feed(path, reject, taken), strict=True)
    header: list[str] | None = None
    while True:
        taken.clear()
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            _reject_csv(path, f"not valid CSV: {error}", taken, reject)
            continue
        text = "".join(line for _, line in taken)
        if not cells:
            continue
        if header is None:
            header = _header(path, cells, columns)
        elif len(cells) != len(header):
            reason = f"the row has {len(cells)} cells, the header has {len(header)}"
            _reject_csv(path, reason, taken, reject)
        elif not text.isascii() and _ESCAPED.search(text):
            reason = "the row is not valid UTF-8; convert the file to UTF-8"
            _reject_csv(path, reason, taken, reject)
        else:
            yield taken[0][0], text, dict(zip(header, cells, strict=True))
    if header is None:
        raise DataError(
            f"the file is empty; expected a header with {', '.join(columns)}", path=path
        )


def _open(path: Path) -> IO[bytes]:
    try:
        file = gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(
            f"expected this file, but it cannot be opened: {error.strerror}", path=path
        ) from error
    return cast("IO[bytes]", file)


def _reject_long(file: IO[bytes], path: Path, number: int, raw: bytes, reject: Reject) -> None:
    start = raw[:1000].decode("utf-8", "backslashreplace")
    while raw and not raw.endswith(b"\n"):
        raw = file.readline(LINE_BYTES)
    reason = f"the line is longer than {LINE_BYTES // 2**20} MiB; is this a file of one row a line?"
    reject(path, number, reason, start)


def _decode(raw: bytes, encodings: Sequence[str]) -> str | None:
    for encoding in encodings:
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _csv_feed(path: Path, reject: Reject, taken: list[tuple[int, str]]) -> Iterator[str]:
    for number, raw in raw_lines(path, reject):
        # Escaped, so that one bad byte costs one row and not the reader's place in the file.
        text = raw.decode("utf-8", "surrogateescape") + "\n"
        taken.append((number, text))
        yield text


def _reject_csv(path: Path, reason: str, taken: list[tuple[int, str]], reject: Reject) -> None:
    text = "".join(line for _, line in taken)
    row = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    if len(taken) > 1:
        reason += f" (the row spans {len(taken)} lines)"
    reject(path, taken[0][0] if taken else None, reason, row)


def _header(path: Path, cells: list[str], columns: Sequence[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if _ESCAPED.search("".join(header)):
        raise DataError(
            "the header is not valid UTF-8; convert the file to UTF-8", path=path, line=1
        )
    missing = [column for column in columns if column not in header]
    if missing:
        raise DataError(
            f"the header lacks {', '.join(missing)}; it has {', '.join(header)}. Rename the column "
            "that holds it.",
            path=path,
            line=1,
        )
    return header
