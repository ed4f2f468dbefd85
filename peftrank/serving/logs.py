"""Structured logs: one JSON object a line, to stderr, with no text or id of users and items.

So exceptions show their type and where they happened, and not their message: it may quote input.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from types import TracebackType
from typing import Any

logger = logging.getLogger("peftrank.serving")


def log(level: int, event: str, **fields: Any) -> None:  # noqa: ANN401 - any JSON value
    """Logs one event with its fields."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={"fields": fields})


def log_exception(event: str, error: BaseException, **fields: Any) -> None:  # noqa: ANN401
    """Logs an exception that nobody expected: its type and where it came from."""
    log(logging.ERROR, event, **_shown(type(error), error.__traceback__), **fields)


def set_up(level: str) -> None:
    """Sends this package's logs to stderr as JSON lines, and what worries uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    own, worries = level.upper(), level.upper() if level in ("debug", "error") else "WARNING"
    for name, least in (("peftrank", own), ("uvicorn", worries)):
        found = logging.getLogger(name)
        found.handlers = [handler]
        found.propagate = False
        found.setLevel(least)


class JsonLines(logging.Formatter):
    """Formats a record as a line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line |= _shown(record.exc_info[0], record.exc_info[2])
        return json.dumps(line, ensure_ascii=True, default=str)


def _shown(kind: type[BaseException], trace: TracebackType | None) -> dict[str, Any]:
    frames = traceback.extract_tb(trace)[-5:]
    where = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno} {frame.name}" for frame in frames]
    return {"exception": kind.__name__, "where": where}
