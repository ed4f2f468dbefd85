"""Continuous batching: requests of many clients are scored together, as they come.

One thread scores. While it does, the queue fills; what waits then, up to a budget of tokens, is
the next batch, whatever domains it mixes. Only an idle server waits, a few milliseconds, for
company. It knows prepared slates and scores, no HTTP.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from peftrank.errors import PeftRankError
from peftrank.ranker import Prepared, Ranker, Scores
from peftrank.serving.metrics import Metrics

_GUESSED_RATE = 1_000.0
"""Tokens per second, until the first batch has been timed."""


class OverloadedError(PeftRankError):
    """The queue is full."""

    def __init__(self, retry_after_seconds: float):
        super().__init__(
            f"the server has too much to do; try again in {retry_after_seconds:.0f} seconds"
        )
        self.retry_after_seconds = retry_after_seconds


class StoppedError(PeftRankError):
    """The server is shutting down."""

    def __init__(self) -> None:
        super().__init__("the server is shutting down; ask another one")


@dataclass(eq=False)
class _Request:
    prepared: Sequence[Prepared]
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[list[Scores]]
    scores: list[Scores | None] = field(default_factory=list)
    given_up: bool = False


class Batcher:
    """The queue and the thread that scores. `start` it, `submit` to it, `stop` it."""

    def __init__(
        self,
        ranker: Ranker,
        metrics: Metrics,
        *,
        batch_tokens: int = 8192,
        max_wait_seconds: float = 0.005,
        queue_tokens: int = 262_144,
    ):
        self._ranker, self._metrics = ranker, metrics
        self._batch_tokens, self._queue_tokens = batch_tokens, queue_tokens
        self._max_wait = max_wait_seconds
        self._queue: deque[tuple[_Request, int]] = deque()  # a slate of a request
        self._waiting = 0  # tokens of what is queued
        self._rate = _GUESSED_RATE
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="peftrank-scoring", daemon=True)

    def start(self) -> None:
        """Starts scoring."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Scores what is queued, refuses the rest, and ends the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)

    def check(self, tokens: int) -> None:
        """Raises OverloadedError or StoppedError if that much cannot be taken now.

        A request larger than the whole queue is taken when nothing waits.
        """
        if self._stopping:
            raise StoppedError
        waiting = self._waiting
        if waiting and waiting + tokens > self._queue_tokens:
            raise OverloadedError(max(1.0, waiting / self._rate))

    async def submit(self, prepared: Sequence[Prepared]) -> list[Scores]:
        """Returns the scores of each slate.

        If the waiting task is cancelled, what has not begun is dropped.

        Raises:
            OverloadedError: the queue is full.
            StoppedError: the server is shutting down.
            PeftRankError: the ranker's, for these slates.
        """
        if not prepared:
            return []
        loop = asyncio.get_running_loop()
        request = _Request(prepared, loop, loop.create_future(), [None] * len(prepared))
        tokens = sum(one.tokens for one in prepared)
        with self._changed:
            self.check(tokens)
            self._queue.extend((request, index) for index in range(len(prepared)))
            self._count(tokens)
            self._changed.notify_all()
        try:
            return await request.answer
        except asyncio.CancelledError:
            self._drop(request)
            raise

    def _count(self, tokens: int) -> None:
        self._waiting += tokens
        self._metrics.queue_tokens.set(self._waiting)

    def _drop(self, request: _Request) -> None:
        with self._changed:
            request.given_up = True
            kept = [entry for entry in self._queue if entry[0] is not request]
            gone = [entry for entry in self._queue if entry[0] is request]
            self._queue = deque(kept)
            self._count(-sum(request.prepared[index].tokens for _, index in gone))

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            self._score(batch)

    def _next(self) -> list[tuple[_Request, int]] | None:
        """Waits for a batch and takes it off the queue; None when stopped and nothing waits."""
        with self._changed:
            if not self._queue:
                self._changed.wait_for(lambda: self._queue or self._stopping)
                deadline = time.monotonic() + self._max_wait
                while self._waiting < self._batch_tokens and not self._stopping:
                    left = deadline - time.monotonic()
                    if left <= 0 or not self._changed.wait(left):
                        break
            batch: list[tuple[_Request, int]] = []
            taken = 0
            while self._queue:
                request, index = self._queue[0]
                tokens = request.prepared[index].tokens
                if batch and taken + tokens > self._batch_tokens:
                    break
                batch.append(self._queue.popleft())
                taken += tokens
            self._count(-taken)
            if not batch and not self._stopping:
                return []  # all of it was given up meanwhile
            return batch or None

    def _score(self, batch: list[tuple[_Request, int]]) -> None:
        if not batch:
            return
        started = time.perf_counter()
        prepared = [request.prepared[index] for request, index in batch]
        try:
            scores = self._ranker.score_prepared(prepared)
        except Exception as error:  # whatever it is, it must not end the thread
            self._fail(batch, error)
            return
        seconds = time.perf_counter() - started
        tokens = sum(one.tokens for one in prepared)
        self._rate += 0.2 * (tokens / seconds - self._rate)
        self._metrics.scoring.observe(seconds)
        self._metrics.batch_slates.observe(len(batch))
        self._metrics.occupancy.observe(min(1.0, tokens / self._batch_tokens))
        self._metrics.tokens.inc(tokens)
        for (request, index), values in zip(batch, scores, strict=True):
            request.scores[index] = values
        for request in {request: None for request, _ in batch}:
            done = [values for values in request.scores if values is not None]
            if len(done) == len(request.scores):
                request.loop.call_soon_threadsafe(_answer, request.answer, done)

    def _fail(self, batch: list[tuple[_Request, int]], error: Exception) -> None:
        """Lets only the requests fail whose slates cause it: each is scored once more, alone."""
        requests = list({request: None for request, _ in batch})
        if len(requests) > 1:
            for one in requests:
                self._score([entry for entry in batch if entry[0] is one])
            return
        self._drop(requests[0])
        requests[0].loop.call_soon_threadsafe(_refuse, requests[0].answer, error)


def _answer(answer: asyncio.Future[list[Scores]], scores: list[Scores]) -> None:
    if not answer.done():
        answer.set_result(scores)


def _refuse(answer: asyncio.Future[list[Scores]], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
