"""Continuous batching: slates of many requests share forward passes, within a budget of tokens.

One thread scores, in rounds. A round's budget is given in tokens, and where the machine is slow in
time, by the rate measured. While a round runs the queue fills by itself, so a busy server never
waits; the first request after an idle moment waits a few milliseconds for company. Slates leave the
queue in the order they came. Knows slates only by their tokens, and neither HTTP nor domains.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from peftrank.errors import PeftRankError
from peftrank.ranker import Prepared, Scores
from peftrank.serving.logs import log_exception

_RATE_ROUNDS = 32
_LONGEST_RETRY = 60
_FIRST_ROUNDS = 2
"""Their rate tells little: code for a model's shapes is made as they first occur."""
_GUESSED_RATE = 1000.0
"""Tokens per second, for the budgets of these."""


class OverloadedError(PeftRankError):
    """The queue is full; `retry_after_seconds` says when it may have room."""

    def __init__(self, message: str, retry_after_seconds: int):
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TooLargeError(PeftRankError):
    """A request that no state of the queue could take."""


class StoppedError(PeftRankError):
    """The server takes no more work."""


@dataclass(frozen=True)
class Round:
    """What was scored at a time."""

    slates: int
    tokens: int
    seconds: float
    occupancy: float
    """Tokens as a share of the budget."""
    failures: int
    """Tries that raised an error."""


class Ticket:
    """A request's slates in the queue. `future` gives their scores, or the error of one of them."""

    def __init__(self, prepared: Sequence[Prepared]):
        self.prepared = tuple(prepared)
        self.tokens = sum(one.tokens for one in prepared)
        self.future: Future[list[Scores]] = Future()
        self._scores: dict[int, Scores] = {}

    def put(self, place: int, scores: Scores) -> None:
        """Keeps one slate's scores; the last one completes the future."""
        self._scores[place] = scores
        if len(self._scores) == len(self.prepared):
            with contextlib.suppress(InvalidStateError):  # its request has just been given up
                self.future.set_result([self._scores[i] for i in range(len(self.prepared))])

    def fail(self, error: Exception) -> None:
        """Gives the request up with an error."""
        with contextlib.suppress(InvalidStateError):
            self.future.set_exception(error)


_Job = tuple[Ticket, int]
"""A request, and the place of one of its slates."""


class Batcher:
    """The queue and the thread that scores what is in it."""

    def __init__(
        self,
        score: Callable[[Sequence[Prepared]], Sequence[Scores]],
        *,
        batch_tokens: int,
        queue_tokens: int,
        batch_seconds: float = math.inf,
        max_wait_seconds: float = 0.005,
        longest_seconds: float = math.inf,
        observe: Callable[[Round], None] = lambda done: None,
    ):
        """Starts the thread.

        Args:
            score: Returns the scores of each prepared slate; called by one thread.
            batch_tokens: Scored at a time; a single larger slate is scored alone.
            queue_tokens: Tokens that may wait.
            batch_seconds: Fewer tokens are taken where they would take longer than this.
            max_wait_seconds: How long the first request after an idle moment waits for others.
            longest_seconds: Work that would wait longer than this, at the rate measured, is
                refused: nobody would wait for its answer.
            observe: Told of each round.
        """
        self._score_prepared = score
        self._batch_tokens, self._batch_seconds = batch_tokens, batch_seconds
        self._queue_tokens = queue_tokens
        self._max_wait, self._longest = max_wait_seconds, longest_seconds
        self._observe = observe
        self._jobs: deque[_Job] = deque()
        self._tokens = 0
        self._changed = threading.Condition()
        self._closing = False
        self._rounds: deque[Round] = deque(maxlen=_RATE_ROUNDS)
        self._running_tokens = 0
        self._budget = 0.0
        self._thread = threading.Thread(target=self._run, name="peftrank-score", daemon=True)
        self._thread.start()

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait."""
        return self._tokens

    @property
    def queued_slates(self) -> int:
        """Slates that wait."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread runs, as it should until `close`."""
        return self._thread.is_alive()

    def submit(self, prepared: Sequence[Prepared]) -> Ticket:
        """Puts a request's slates into the queue.

        Raises:
            OverloadedError: they have no room now.
            TooLargeError: they never have.
            StoppedError: after `close`.
        """
        ticket = Ticket(prepared)
        self.check_size(ticket.tokens)
        with self._changed:
            if self._closing:
                raise StoppedError("the server is stopping")
            self._check_room(ticket.tokens)
            self._jobs.extend((ticket, place) for place in range(len(ticket.prepared)))
            self._tokens += ticket.tokens
            self._changed.notify()
        if not ticket.prepared:
            ticket.future.set_result([])
        return ticket

    def check_room(self) -> None:
        """Raises OverloadedError if the queue could take no request at all; saves preparing one."""
        with self._changed:
            self._check_room(1)

    def check_size(self, tokens: int) -> None:
        """Raises TooLargeError if a request of so many tokens can never be taken."""
        if tokens > self._queue_tokens:
            raise TooLargeError(
                f"the request has {tokens} tokens or more and the queue holds "
                f"{self._queue_tokens}; send fewer slates at a time"
            )

    def drop(self, ticket: Ticket) -> None:
        """Takes a request's slates out of the queue, unless they are being scored."""
        if not ticket.future.cancel() and ticket.future.exception() is None:
            return  # all its slates are scored
        with self._changed:
            self._keep([job for job in self._jobs if job[0] is not ticket])

    def close(self, timeout: float | None = None) -> None:
        """Ends the thread after the round it is in; what waits fails with `StoppedError`."""
        with self._changed:
            self._closing = True
            left = list(self._jobs)
            self._keep([])
            self._changed.notify()
        for ticket, _ in left:
            ticket.fail(StoppedError("the server is stopping"))
        self._thread.join(timeout)

    def _check_room(self, tokens: int) -> None:
        waiting = self._tokens
        if waiting + tokens > self._queue_tokens:
            full = f"the queue is full: {waiting} of {self._queue_tokens} tokens wait"
        # With an empty queue work is always taken, so a rate measured too low corrects itself.
        elif waiting and (waiting + tokens) / self._rate() > self._longest:
            full = f"{waiting} tokens wait, more than is scored before the request's time is over"
        else:
            return
        busy = (waiting + self._running_tokens) / self._rate()
        seconds = min(max(1, math.ceil(busy)), _LONGEST_RETRY)
        raise OverloadedError(f"{full}. Try again in {seconds} s.", seconds)

    def _rate(self) -> float:
        """Returns tokens per second, the median of the latest rounds; at first, no limit.

        A round that was slow for once (its shapes were new, the machine was busy) does not count.
        """
        rounds = list(self._rounds)
        if len(rounds) < _FIRST_ROUNDS:
            return math.inf
        return statistics.median_high(done.tokens / max(done.seconds, 1e-6) for done in rounds)

    def _next_budget(self) -> float:
        rate = self._rate() if len(self._rounds) >= _FIRST_ROUNDS else _GUESSED_RATE
        return max(1.0, min(self._batch_tokens, rate * self._batch_seconds))

    def _run(self) -> None:
        while self._work():
            pass

    def _work(self) -> bool:
        """Scores what is next; False when the thread is to end."""
        jobs = self._take()
        if not jobs:
            return False
        tokens = self._running_tokens
        started = time.perf_counter()
        failures = self._score(jobs)
        seconds = time.perf_counter() - started
        done = Round(len(jobs), tokens, seconds, tokens / self._budget, failures)
        with self._changed:
            self._running_tokens = 0
            self._rounds.append(done)
        self._observe(done)
        return True

    def _take(self) -> list[_Job]:
        """Returns the next slates to score together; none when the thread is to end."""
        with self._changed:
            if not self._jobs:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                self._changed.wait_for(
                    lambda: self._tokens >= self._next_budget() or self._closing, self._max_wait
                )
            while not self._jobs and not self._closing:  # its request was dropped meanwhile
                self._changed.wait()
            self._budget = self._next_budget()
            chosen: list[_Job] = []
            tokens = 0
            while self._jobs:
                ticket, place = self._jobs[0]
                size = ticket.prepared[place].tokens
                if chosen and tokens + size > self._budget:
                    break
                chosen.append(self._jobs.popleft())
                tokens += size
            self._tokens -= tokens
            self._running_tokens = tokens
            return chosen

    def _score(self, jobs: Sequence[_Job]) -> int:
        """Scores slates and returns how many tries failed.

        Where they fail together, halves of the requests are tried apart, so that only those whose
        slates cause it fail.
        """
        jobs = [job for job in jobs if not job[0].future.done()]
        if not jobs:
            return 0
        try:
            scored = self._score_prepared([ticket.prepared[place] for ticket, place in jobs])
            for (ticket, place), scores in zip(jobs, scored, strict=True):
                ticket.put(place, scores)
            return 0
        except Exception as error:
            tickets = list(dict.fromkeys(ticket for ticket, _ in jobs))
            if len(tickets) == 1:
                if not isinstance(error, PeftRankError):
                    log_exception("scoring_failed", error, slates=len(jobs))
                tickets[0].fail(error)
                return 1
        first = set(tickets[: len(tickets) // 2])
        failures = self._score([job for job in jobs if job[0] in first])
        return 1 + failures + self._score([job for job in jobs if job[0] not in first])

    def _keep(self, jobs: list[_Job]) -> None:
        self._jobs = deque(jobs)
        self._tokens = sum(ticket.prepared[place].tokens for ticket, place in jobs)
