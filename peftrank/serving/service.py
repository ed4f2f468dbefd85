"""The work behind the HTTP API: requests to rankings, events to histories, adapters to answers.

A request's body is read and its slates prepared in worker threads; from there its adapter version
is fixed. The slates are scored together with those of others (`batching`). Nothing here blocks
the event loop, and nothing knows HTTP.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

from peftrank import samples, store
from peftrank.errors import AdapterError, ConfigError, PeftRankError
from peftrank.formats._record import slate_record
from peftrank.formats.slates import read_slates
from peftrank.plugins import did_you_mean
from peftrank.ranker import AdapterInfo, Prepared, Ranker, Scores, explanation, ranked
from peftrank.serving import _schemas
from peftrank.serving.batching import Batcher, OverloadedError, StoppedError
from peftrank.serving.history import History
from peftrank.serving.logs import log, log_exception
from peftrank.serving.metrics import Metrics
from peftrank.serving.settings import ServeSettings
from peftrank.serving.watch import Watcher
from peftrank.types import Slate

P = ParamSpec("P")
T = TypeVar("T")
_WORKERS = min(os.cpu_count() or 1, 8)
"""For what computes; more would only wait for one another."""
_WAITING_THREADS = 32
"""For what waits for a disk or another machine; a lost Redis holds each for a second or two."""
_BASE_KEYS = ("name", "quantization", "compute_dtype", "architecture", "fingerprint")


@dataclass(frozen=True)
class _Parts:
    """What there is once the base is loaded."""

    ranker: Ranker
    batcher: Batcher
    watcher: Watcher


class StartingError(PeftRankError):
    """The base and the first adapters are not loaded yet."""


class Service:
    """A ranker with its queue, its histories and its link to the store."""

    def __init__(
        self,
        ranker: Ranker | Callable[[], Ranker],
        settings: ServeSettings,
        history: History | None,
        domains: Sequence[str] | None,
    ):
        """Starts nothing; see `create_app` for the arguments."""
        self.settings = settings
        self.metrics = Metrics()
        self.state: Literal["starting", "ready", "stopping", "failed"] = "starting"
        self.failure: Exception | None = None
        """Why it could not start."""
        self.on_failure: Callable[[], None] = lambda: None
        self.under_way: set[asyncio.Timeout] = set()
        """Requests, each by the limit of its time."""
        self.finishing: set[asyncio.Timeout] = set()
        """Of these, once the server stops, those that it had taken before."""
        self._made, self._history, self._domains = ranker, history, domains
        self._loading: asyncio.Task[None] | None = None
        self._parts: _Parts | None = None
        self._workers = ThreadPoolExecutor(_WORKERS, "peftrank-prepare")
        self._waiting = ThreadPoolExecutor(_WAITING_THREADS, "peftrank-wait")

    async def start(self) -> None:
        """Starts with the ranker; one that is still to be made is made in the background."""
        if isinstance(self._made, Ranker):
            self._begin(self._made, self._watcher(self._made))
        else:
            self._loading = asyncio.create_task(self._load(self._made))

    def drain(self) -> None:
        """Takes no more requests; those under way finish."""
        self.state = "stopping"
        # Each request takes itself out of the set that it is in.
        self.finishing, self.under_way = self.under_way, set()
        self.metrics.ready.set(0)
        log(logging.INFO, "stopping")

    def give_up(self) -> None:
        """Ends the time of the requests under way; they are answered that the server stops."""
        for limit in self.finishing | self.under_way:
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Ends all threads; what still waits fails with StoppedError."""
        self.state = "stopping"
        if self._loading is not None:
            await asyncio.wait([self._loading])
        await asyncio.to_thread(self._close)

    def check_ready(self) -> None:
        """Raises StartingError or StoppedError unless requests are taken."""
        if self.state == "stopping":
            raise StoppedError("the server is shutting down; ask another one")
        if self.state == "failed":
            raise StartingError("the server could not start; its log says why")
        if self.state == "starting":
            raise StartingError("the server is loading its base and adapters")

    def check_taken(self) -> None:
        """Raises as `check_ready` does, or OverloadedError: this request is one too many."""
        self.check_ready()
        if len(self.under_way) > self.settings.max_requests:
            message = f"{len(self.under_way) - 1} requests are under way. Try again in 1 s."
            raise OverloadedError(message, 1)

    @property
    def alive(self) -> bool:
        """Whether the scoring thread runs, as it should from the start to the end."""
        return self._parts is None or self._parts.batcher.alive or self.state == "stopping"

    @property
    def domains(self) -> tuple[str, ...]:
        """The loaded domains."""
        return () if self._parts is None else self._parts.ranker.domains

    def figures(self) -> bytes:
        """Returns the answer to GET /metrics."""
        if self._parts is not None:
            self.metrics.look(self._parts.ranker, self._parts.batcher)
        return self.metrics.text()

    async def rank(self, body: bytes) -> bytes:
        """Returns the answer to POST /v1/rank.

        Raises:
            DataError, ConfigError, LimitError: the request is wrong.
            OverloadedError, TooLargeError, StoppedError: it cannot be taken.
            HistoryError: a stored history cannot be read.
            AdapterError: an adapter cannot be read again, or gives no finite scores.
        """
        batcher = self._started.batcher
        batcher.check_room()
        call = await self._work(_schemas.rank_call, body, self.settings)
        if call.stored and self._history is not None:
            call = await self._wait(self._with_histories, call, self._history)
        groups = await self._work(self._prepare, call)
        ticket = batcher.submit([one for group in groups for one in group])
        try:
            scores = await asyncio.wrap_future(ticket.future)
        finally:
            batcher.drop(ticket)
        return await self._work(self._answer, call, groups, scores)

    async def store_events(self, body: bytes) -> dict[str, int]:
        """Returns the answer to POST /v1/events, once the events are kept.

        Raises:
            DataError, ConfigError, LimitError: the request is wrong.
            HistoryError: they cannot be kept; none is.
        """
        history = self._kept_history()
        events = await self._work(_schemas.events, body, self.settings, time.time())
        await self._wait(self._check_domains, sorted({event.domain for event in events}))
        stored = await self._wait(history.append, events)
        duplicates = len(events) - stored
        self.metrics.events.inc(stored)
        self.metrics.duplicates.inc(duplicates)
        return {"stored": stored, "duplicates": duplicates}

    async def forget(self, user_id: str) -> dict[str, int]:
        """Returns how many events of a user were deleted.

        Raises:
            HistoryError: the history cannot be changed.
        """
        return {"deleted": await self._wait(self._kept_history().forget, user_id)}

    async def adapters(self) -> dict[str, Any]:
        """Returns the base, and what of each domain is loaded and stored."""
        return await self._wait(self._adapters)

    async def load(self, domain: str, body: bytes) -> dict[str, Any]:
        """Loads a version, or the active one; see `Watcher.load`."""
        version = _schemas.version_named(body, needed=False)
        await self._wait(self._started.watcher.load, domain, version)
        return await self._wait(self._adapter, domain)

    async def unload(self, domain: str) -> dict[str, Any]:
        """Stops serving a domain; see `Watcher.unload`."""
        await self._wait(self._started.watcher.unload, domain)
        return await self._wait(self._adapter, domain)

    async def activate(self, domain: str, body: bytes) -> dict[str, Any]:
        """Loads a version and makes it the active one; see `Watcher.activate`."""
        version = _schemas.version_named(body, needed=True)
        await self._wait(self._started.watcher.activate, domain, version or "")
        return await self._wait(self._adapter, domain)

    async def sample(self, domain: str, n: int) -> list[dict[str, Any]] | None:
        """Returns slates of a domain's embedded sample; None if it has none."""
        if domain not in samples.samples():
            return None
        return (await self._wait(_sample, domain))[:n]

    @property
    def _started(self) -> _Parts:
        if self._parts is None:
            raise StartingError("the server is loading its base and adapters")
        return self._parts

    async def _load(self, make: Callable[[], Ranker]) -> None:
        try:
            ranker = await asyncio.to_thread(make)
            watcher = self._watcher(ranker)
            await asyncio.to_thread(watcher.load_all)
        except Exception as error:
            self.failure = error
            if self.state == "starting":
                self.state = "failed"
            if not isinstance(error, PeftRankError):
                log_exception("start_failed", error)
            self.on_failure()
        else:
            self._begin(ranker, watcher)

    def _begin(self, ranker: Ranker, watcher: Watcher) -> None:
        if self.state != "starting":  # stopped before it began
            return
        settings = self.settings
        batcher = Batcher(
            ranker.score_prepared,
            batch_tokens=settings.batch_tokens,
            batch_seconds=settings.batch_seconds,
            queue_tokens=settings.queue_tokens,
            max_wait_seconds=settings.max_wait_ms / 1000,
            longest_seconds=settings.timeout_seconds,
            observe=self.metrics.observe,
        )
        self._parts = _Parts(ranker, batcher, watcher)
        watcher.start()
        self.state = "ready"
        self.metrics.ready.set(1)
        log(logging.INFO, "ready", domains=list(ranker.domains))

    def _watcher(self, ranker: Ranker) -> Watcher:
        seconds = self.settings.watch_seconds
        return Watcher(ranker, self.metrics, domains=self._domains, seconds=seconds)

    def _close(self) -> None:
        if self._parts is not None:
            self._parts.batcher.close()
            self._parts.watcher.close()
        self._workers.shutdown(cancel_futures=True)
        self._waiting.shutdown(cancel_futures=True)
        if self._history is not None:
            self._history.close()

    async def _work(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Computes in a worker thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, functools.partial(do, *args, **kwargs))

    async def _wait(self, do: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Waits, in a thread of its own pool, for a disk or another machine."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._waiting, functools.partial(do, *args, **kwargs))

    def _kept_history(self) -> History:
        if self._history is None:
            raise ConfigError("this server keeps no histories; start it with --history")
        return self._history

    def _with_histories(self, call: _schemas.RankCall, history: History) -> _schemas.RankCall:
        """Returns the call with the stored history of each slate that brought none."""
        found: dict[tuple[str, str], Slate] = {}
        slates = list(call.slates)
        for place in call.stored:
            slate = slates[place]
            domain = call.domain_of(slate)
            if domain is None:  # `prepare` says so
                continue
            key = slate.user_id, domain
            if key not in found:
                events = history.recent(*key, self.settings.history_items)
                self.metrics.histories.labels("yes" if events else "no").inc()
                known = [event.feedback for event in events if event.feedback is not None]
                found[key] = replace(
                    slate,
                    history=tuple(event.item for event in events),
                    history_feedback=tuple(known) if len(known) == len(events) else None,
                )
            filled = found[key]
            slates[place] = replace(
                slate, history=filled.history, history_feedback=filled.history_feedback
            )
        return replace(call, slates=slates)

    def _prepare(self, call: _schemas.RankCall) -> list[list[Prepared]]:
        """Returns, per slate, what is scored for it: itself, and what its explanation needs."""
        ranker, batcher = self._started.ranker, self._started.batcher
        self._check_loaded(call, ranker.adapters)
        prepared = ranker.prepare(call.slates, domain=call.domain, untrained=call.untrained)
        if not call.explain:
            return [[one] for one in prepared]
        # Without each history item in turn a slate has, in all, at least this many tokens, and to
        # make all of that can take a worker longer than any request may.
        batcher.check_size(sum(one.tokens * max(1, len(one.history_read)) for one in prepared))
        return [ranker.variants(one) for one in prepared]

    def _check_loaded(self, call: _schemas.RankCall, loaded: Mapping[str, AdapterInfo]) -> None:
        """Raises ConfigError for a slate whose domain is not loaded; counts where adapters are."""
        for slate in call.slates:
            domain = call.domain_of(slate)
            if domain not in loaded:
                told = "none is given" if domain is None else f"{domain!r} is not loaded"
                hint = "" if domain is None else did_you_mean(domain, loaded)
                raise ConfigError(
                    f"slate {slate.slate_id!r}: its domain: {told}{hint}. "
                    f"Loaded: {', '.join(loaded) or 'none'}."
                )
        for domain in {call.domain_of(slate) for slate in call.slates}:
            self.metrics.adapter_reads.labels(loaded[domain or ""].tier).inc()

    def _answer(
        self, call: _schemas.RankCall, groups: Sequence[Sequence[Prepared]], scores: list[Scores]
    ) -> bytes:
        """Returns the JSON of the rankings."""
        left = iter(scores)
        rankings = []
        for slate, group in zip(call.slates, groups, strict=True):
            own = list(itertools.islice(left, len(group)))
            best = ranked(slate, own[0], call.k)
            told = _explained(group[0], own, best.item_ids) if call.explain else None
            self.metrics.slates.labels(group[0].domain).inc()
            rankings.append(
                {
                    "slate_id": slate.slate_id,
                    "domain": group[0].domain,
                    "version": group[0].version,
                    "item_ids": best.item_ids,
                    "scores": best.scores,
                    "explanation": told,
                }
            )
        return to_json({"rankings": rankings})

    def _check_domains(self, domains: Sequence[str]) -> None:
        """Raises ConfigError for a domain that is neither loaded nor in the store."""
        ranker = self._started.ranker
        for domain in domains:
            if domain in ranker.domains:
                continue
            known = sorted({*ranker.domains, *store.domains(ranker.store)})
            if domain not in known:
                raise ConfigError(
                    f"domain {domain!r} is unknown{did_you_mean(domain, known)}. Domains here: "
                    f"{', '.join(known) or 'none'}."
                )

    def _adapters(self) -> dict[str, Any]:
        ranker = self._started.ranker
        identity = vars(ranker.base.identity)
        names = {*ranker.domains, *store.domains(ranker.store)}
        return {
            "base": {**{key: identity[key] for key in _BASE_KEYS}, **ranker.memory()},
            "adapters": [self._adapter(name) for name in sorted(names)],
        }

    def _adapter(self, domain: str) -> dict[str, Any]:
        ranker = self._started.ranker
        info = ranker.adapters.get(domain)
        try:
            active = store.active(ranker.store, domain)
        except AdapterError:  # the watcher raises its alarm
            active = None
        return {
            **({"domain": domain, "version": None} if info is None else asdict(info)),
            "active": active,
            "versions": store.versions(ranker.store, domain),
            "stale": self._started.watcher.stale(domain),
        }


def to_json(value: Any) -> bytes:  # noqa: ANN401 - any JSON value
    """Returns compact JSON."""
    return json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


def _explained(
    whole: Prepared, scores: Sequence[Scores], item_ids: Sequence[str]
) -> dict[str, Any]:
    """Returns the explanation from the scores of the slate's variants, `whole` being the first."""
    found = explanation(whole.history_read, scores)
    places = {item.item_id: place for place, item in enumerate(whole.slate.candidates)}
    return {
        "history": [whole.slate.history[place].item_id for place in found.history],
        "effects": {
            item_id: [effect[places[item_id]] for effect in found.effects] for item_id in item_ids
        },
    }


@functools.cache
def _sample(domain: str) -> list[dict[str, Any]]:
    path = samples.sample_path(domain, "test")
    return [slate_record(slate) for slate in read_slates(path)]
