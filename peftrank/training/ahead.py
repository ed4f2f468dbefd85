"""What a thread of its own makes ahead of the moment that it is needed. Knows nothing of slates."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")
_END = object()
_LOOK = 0.1
"""Seconds after which a thread that waits for room looks whether it should stop."""


def ahead(values: Iterator[T], count: int) -> Generator[T, None, None]:
    """Yields the values, of which a thread makes up to `count` more than were asked for.

    They come in the same order, and what making one raises is raised where it would have come.
    When the iterator is closed, the thread ends before anything else happens.
    """
    made: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(count)
    stopping = threading.Event()

    def put(value: object, error: BaseException | None = None) -> None:
        while not stopping.is_set():
            try:
                return made.put((value, error), timeout=_LOOK)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for value in values:
                put(value)
                if stopping.is_set():
                    return
        except BaseException as error:
            put(_END, error)
        else:
            put(_END)

    worker = threading.Thread(target=work, name="peftrank-ahead", daemon=True)
    worker.start()
    try:
        while True:
            value, error = made.get()
            if error is not None:
                raise error
            if value is _END:
                return
            yield value  # type: ignore[misc]
    finally:
        stopping.set()
        worker.join()
