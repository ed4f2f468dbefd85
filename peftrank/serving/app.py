"""The HTTP app: requests in, rankings out. docs/serving.md describes the routes.

Nothing blocks the event loop: reading JSON, tokenizing, histories and loading run in threads, and
one thread scores. It knows a ranker and a store of histories; what a command line says is in
`server`.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftrank import store
from peftrank.errors import AdapterError, ConfigError, DataError, PeftRankError
from peftrank.formats._record import slate_record
from peftrank.formats.slates import read_slates
from peftrank.ranker import Prepared, Ranker, explanation, ranked
from peftrank.samples import sample_path, samples
from peftrank.serving import _schemas
from peftrank.serving.batching import Batcher, OverloadedError, StoppedError
from peftrank.serving.history import History, HistoryError
from peftrank.serving.metrics import Metrics
from peftrank.serving.settings import ServeSettings
from peftrank.serving.watch import Watcher
from peftrank.types import Slate

T = TypeVar("T")
_PAGE = files("peftrank.serving") / "page"
_PAGE_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_log = logging.getLogger(__name__)


class _AuthError(PeftRankError):
    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class _LimitError(PeftRankError):
    """A body that is too large."""


class _TimeoutError(PeftRankError):
    """A request that took too long."""


class _GoneError(PeftRankError):
    """A client that did not wait for its answer."""


class Service:
    """What the routes share: the ranker with its queue, watcher, histories and threads."""

    def __init__(
        self,
        ranker: Ranker,
        settings: ServeSettings,
        history: History | None,
        domains: tuple[str, ...] | None,
    ):
        self.ranker, self.settings, self.history = ranker, settings, history
        self.metrics = Metrics()
        self.batcher = Batcher(
            ranker,
            self.metrics,
            batch_tokens=settings.batch_tokens,
            max_wait_seconds=settings.max_wait_ms / 1000,
            queue_tokens=settings.queue_tokens,
        )
        self.watcher = Watcher(ranker, self.metrics, domains)
        self.ready = False
        self.draining = False
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="peftrank-request")

    def start(self) -> None:
        """Starts scoring and watching."""
        self.batcher.start()
        if self.settings.watch_seconds:
            self.watcher.start(self.settings.watch_seconds)
        self.watcher.count()
        self.ready = True

    def stop(self) -> None:
        """Finishes what was accepted, and ends the threads."""
        self.draining = True
        self.batcher.stop(self.settings.grace_seconds)
        self.watcher.stop()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.history is not None:
            self.history.close()

    async def in_thread(self, call: Callable[..., T], *arguments: Any) -> T:  # noqa: ANN401
        """Returns what a blocking call returns."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(call, *arguments))

    async def rank(self, body: bytes) -> dict[str, Any]:
        """Returns the answer of /v1/rank."""
        slates, options, prepared = await self.in_thread(self._prepare, body)
        self.batcher.check(sum(one.tokens for one in prepared))
        explaining = bool(options["explain"])
        work = list(prepared)
        if explaining:
            variants = await self.in_thread(lambda: [self.ranker.variants(p) for p in prepared])
            work = [one for several in variants for one in several]
        scores = await self.batcher.submit(work)
        answers, first = [], 0
        for index, (slate, one) in enumerate(zip(slates, prepared, strict=True)):
            explained = None
            if explaining:
                last = first + len(variants[index])
                explained = explanation(one.history_read, scores[first:last])
                values, first = scores[first], last
            else:
                values = scores[index]
            found = ranked(slate, values, options["k"])
            answers.append(_schemas.ranking(one, found, explained, options["k"]))
            self.metrics.slates.labels(one.domain).inc()
        return {"rankings": answers}

    def _prepare(self, body: bytes) -> tuple[list[Slate], dict[str, Any], list[Prepared]]:
        given, options = _schemas.rank_request(_schemas.parse_json(body), self.settings)
        slates = []
        for slate, has_history in given:
            domain = slate.domain if options["domain"] is None else options["domain"]
            slates.append(slate if has_history else self._remembered(slate, domain))
        prepared = self.ranker.prepare(
            slates, domain=options["domain"], untrained=options["adapter"] == "none"
        )
        return slates, options, prepared

    def _remembered(self, slate: Slate, domain: str | None) -> Slate:
        if self.history is None or domain is None:
            return slate
        events = self.history.recent(slate.user_id, domain, self.settings.max_history)
        self.metrics.histories.labels("yes" if events else "no").inc()
        feedback = [event.feedback for event in events]
        known = [value for value in feedback if value is not None]
        return replace(
            slate,
            history=tuple(event.item for event in events),
            # One number each or none: a history of which only some are rated counts as unrated.
            history_feedback=tuple(known) if len(known) == len(events) and events else None,
        )

    def store_events(self, body: bytes) -> dict[str, int]:
        """Returns the answer of /v1/events."""
        events = _schemas.event_request(_schemas.parse_json(body), self.settings)
        stored = self.kept().append(events)
        self.metrics.events.inc(stored)
        return {"stored": stored, "duplicates": len(events) - stored}

    def kept(self) -> History:
        """Returns the store of histories; raises ConfigError if the server has none."""
        if self.history is None:
            raise ConfigError("this server keeps no histories; start it with --history")
        return self.history

    def adapters(self) -> dict[str, Any]:
        """Returns the answer of /v1/adapters."""
        identity = self.ranker.base.identity
        shown = ("name", "model_id", "quantization", "compute_dtype", "architecture")
        found = []
        for domain, info in self.ranker.adapters.items():
            try:
                active = store.active(self.ranker.store, domain)
            except AdapterError:
                active = None  # the alarm metric says why
            versions = store.versions(self.ranker.store, domain)
            found.append(_schemas.adapter_record(info, active, versions))
        base = {name: getattr(identity, name) for name in shown}
        return {"base": {**base, **self.ranker.memory()}, "adapters": found}

    def load(self, domain: str, body: bytes) -> dict[str, str]:
        """Loads a version, or the active one."""
        return {"domain": domain, "version": self.watcher.load(domain, _version(body))}

    def unload(self, domain: str) -> dict[str, str]:
        """Lets go of a domain; it stays away until another version becomes active."""
        self.ranker.unload_adapter(store.check_domain(domain))
        self.watcher.count()
        return {"domain": domain}

    def activate(self, domain: str, body: bytes) -> dict[str, str]:
        """Makes a version the store's active one, after it has been loaded."""
        version = _version(body)
        if version is None:
            raise DataError("give the `version` to activate")
        # First load: a version that cannot be loaded must not become the active one.
        self.watcher.load(domain, version)
        store.activate(self.ranker.store, domain, version)
        return {"domain": domain, "version": version}


def create_app(
    ranker: Ranker,
    settings: ServeSettings | None = None,
    *,
    history: History | None = None,
    domains: tuple[str, ...] | None = None,
) -> FastAPI:
    """Returns the app that serves a ranker; what the store makes active is loaded as it serves.

    Args:
        ranker: With the adapters to start with; the app loads others, and closes nothing of it.
        settings: Limits and tokens.
        history: Where users' events are kept; None: requests bring their histories. Closed with
            the app.
        domains: Those to keep at the store's active version; None: all.
    """
    settings = settings or ServeSettings()
    service = Service(ranker, settings, history, domains)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    app = FastAPI(
        title="PeftRank",
        description="Ranks candidate lists with one adapter per domain on one shared base.",
        lifespan=lifespan,
    )
    app.state.service = service
    _rank_routes(app, service)
    _adapter_routes(app, service)
    _health_routes(app, service)
    _page_routes(app)
    app.add_middleware(_Watched, service=service)
    app.add_exception_handler(HTTPException, _said)
    app.add_exception_handler(RequestValidationError, _said)
    return app


def _rank_routes(app: FastAPI, service: Service) -> None:
    @app.post(
        "/v1/rank",
        openapi_extra=_schemas.RANK_BODY,
        responses=_schemas.answers(_schemas.RANK_ANSWER),
        summary="Rank the candidates of one or several slates",
    )
    async def rank(request: Request) -> Response:
        body = await _body(request, service.settings)
        try:
            async with asyncio.timeout(service.settings.timeout_seconds):
                return JSONResponse(await _while_connected(request, service.rank(body)))
        except TimeoutError:
            raise _TimeoutError(
                f"no answer within {service.settings.timeout_seconds:g} seconds; "
                "send fewer slates at a time, or try again"
            ) from None

    @app.post(
        "/v1/events",
        openapi_extra=_schemas.EVENT_BODY,
        responses=_schemas.answers({"stored": 1, "duplicates": 0}),
        summary="Append to users' histories",
    )
    async def events(request: Request) -> Response:
        body = await _body(request, service.settings)
        return JSONResponse(await service.in_thread(service.store_events, body))

    @app.delete(
        "/v1/users/{user_id:path}",
        responses=_schemas.answers({"deleted": 12}),
        summary="Forget a user's history",
    )
    async def forget(request: Request, user_id: str) -> Response:
        _check_admin(request, service.settings)
        deleted = await service.in_thread(service.kept().forget, user_id)
        return JSONResponse({"deleted": deleted})

    @app.get("/v1/samples/{domain}", summary="Slates of a domain's embedded sample")
    async def sample(domain: str, n: int = 10) -> Response:
        return JSONResponse(await service.in_thread(_sample, domain, n))


def _adapter_routes(app: FastAPI, service: Service) -> None:
    @app.get("/v1/adapters", summary="The base, and what is loaded and active in each domain")
    async def adapters() -> Response:
        return JSONResponse(await service.in_thread(service.adapters))

    @app.post(
        "/v1/adapters/{domain}/load",
        summary="Load a version, or the active one",
        openapi_extra=_schemas.VERSION_BODY,
        responses=_schemas.answers({"domain": "news", "version": "0002"}),
    )
    async def load(request: Request, domain: str) -> Response:
        _check_admin(request, service.settings)
        body = await _body(request, service.settings)
        return JSONResponse(await service.in_thread(service.load, domain, body))

    @app.post(
        "/v1/adapters/{domain}/activate",
        summary="Load a version and make it the active one of the store",
        openapi_extra=_schemas.VERSION_BODY,
        responses=_schemas.answers({"domain": "news", "version": "0002"}),
    )
    async def activate(request: Request, domain: str) -> Response:
        _check_admin(request, service.settings)
        body = await _body(request, service.settings)
        return JSONResponse(await service.in_thread(service.activate, domain, body))

    @app.post("/v1/adapters/{domain}/unload", summary="Let go of a domain")
    async def unload(request: Request, domain: str) -> Response:
        _check_admin(request, service.settings)
        return JSONResponse(await service.in_thread(service.unload, domain))


def _health_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", summary="Whether the process is alive")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", summary="Whether requests should be sent here")
    async def readyz() -> Response:
        if service.draining or not service.ready:
            return _error(503, "overloaded", "not ready: starting or shutting down")
        return JSONResponse({"status": "ready", "domains": list(service.ranker.domains)})

    @app.get("/metrics", summary="Figures for Prometheus")
    async def metrics() -> Response:
        service.watcher.count()
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def _page_routes(app: FastAPI) -> None:
    def shown(name: str) -> Response:
        suffix = "." + name.rpartition(".")[2]
        page = _PAGE / name
        if "/" in name or suffix not in _PAGE_TYPES or not page.is_file():
            raise HTTPException(404)
        return Response(page.read_bytes(), media_type=_PAGE_TYPES[suffix], headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return shown("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def page(name: str) -> Response:
        return shown(name)


class _Watched:
    """Around the app: checks tokens, turns errors into answers, measures and logs each request."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        sent: dict[str, Any] = {}

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent["status"] = message["status"]
                sent["error"] = dict(message["headers"]).get(b"x-peftrank-error", b"").decode()
            await send(message)

        try:
            _check_token(Request(scope), self.service)
            await self.app(scope, receive, sending)
        except Exception as error:
            if sent:  # the answer has begun; it cannot become another
                raise
            await _failure(error)(scope, receive, sending)
        self._note(scope, sent, time.perf_counter() - started)

    def _note(self, scope: Scope, sent: dict[str, Any], seconds: float) -> None:
        found = scope.get("route")
        route = "unknown" if found is None else found.path  # never the path itself: it has ids
        status, kind = sent.get("status", 0), sent.get("error")
        self.service.metrics.latency.labels(route, status).observe(seconds)
        if kind:
            self.service.metrics.errors.labels(kind).inc()
        extra = {"method": scope["method"], "route": route, "status": status}
        _log.info("request", extra={**extra, "ms": round(1000 * seconds, 1), "error": kind or None})


def _check_token(request: Request, service: Service) -> None:
    path = request.url.path
    if not path.startswith("/v1/"):
        return
    if service.draining:
        raise StoppedError
    settings = service.settings
    allowed = [token for token in (settings.token, settings.admin_token) if token]
    if settings.token and not _bears(request, allowed):
        raise _AuthError(401, "this server needs a token: Authorization: Bearer TOKEN")


def _check_admin(request: Request, settings: ServeSettings) -> None:
    if not settings.admin_token:
        raise _AuthError(
            403, "this server lets nobody do that; it was started without PEFTRANK_ADMIN_TOKEN"
        )
    if not _bears(request, [settings.admin_token]):
        raise _AuthError(401, "this needs the admin token: Authorization: Bearer TOKEN")


def _bears(request: Request, tokens: list[str]) -> bool:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    matches = [hmac.compare_digest(given.encode(), token.encode()) for token in tokens]
    return scheme.lower() == "bearer" and any(matches)


async def _body(request: Request, settings: ServeSettings) -> bytes:
    most = settings.max_body_bytes
    message = f"the body is larger than {most:,} bytes; send fewer slates at a time"
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _LimitError(message)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _LimitError(message)
    return bytes(body)


async def _while_connected(request: Request, work: Awaitable[T]) -> T:
    """Returns what `work` returns; cancels it once the client has gone."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise _GoneError("the client has gone")
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()


def _failure(error: Exception) -> Response:
    if isinstance(error, OverloadedError):
        answer = _error(429, "overloaded", str(error))
        answer.headers["Retry-After"] = str(int(error.retry_after_seconds + 0.5))
        return answer
    if isinstance(error, _AuthError):
        answer = _error(error.status, "auth", str(error))
        if error.status == 401:
            answer.headers["WWW-Authenticate"] = "Bearer"
        return answer
    for kind, status, name in (
        (_LimitError, 413, "limit"),
        (_GoneError, 499, "gone"),
        (_TimeoutError, 504, "timeout"),
        (StoppedError, 503, "overloaded"),
        (HistoryError, 503, "history"),
        (DataError, 400, "data"),
        (ConfigError, 400, "config"),
        (AdapterError, 400, "adapter"),
    ):
        if isinstance(error, kind):
            return _error(status, name, str(error))
    _log.error("request failed", exc_info=error)
    return _error(500, "internal", "the server failed; its log says why")


def _error(status: int, kind: str, message: str) -> JSONResponse:
    return JSONResponse(
        {"error": {"type": kind, "message": message}}, status, headers={"X-PeftRank-Error": kind}
    )


async def _said(_: Request, error: Exception) -> Response:
    """Returns the answer where no route took the request."""
    status = error.status_code if isinstance(error, HTTPException) else 400
    known = {404: "there is nothing at this address", 405: "this address has another method"}
    message = known.get(status, "the address is malformed; /docs shows what each one takes")
    return _error(status, "data", message)


def _version(body: bytes) -> str | None:
    found = _schemas.parse_json(body) if body.strip() else {}
    version = found.get("version")
    if version is not None and not isinstance(version, str):
        raise DataError("version must be a text, as /v1/adapters lists them")
    return version


def _sample(domain: str, n: int) -> dict[str, Any]:
    if domain not in samples():
        raise HTTPException(404)
    slates = read_slates(sample_path(domain, "test"))
    return {"slates": [slate_record(slate) for slate in list(slates)[: max(0, min(n, 100))]]}
