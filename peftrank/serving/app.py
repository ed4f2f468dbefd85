"""The HTTP API as a FastAPI application: routes, statuses and headers. The work is in `service`.

Every error is `{"error": {"type", "message"}}`. A request is counted, timed and logged by its
route, never by its text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from peftrank import __version__, store
from peftrank.errors import AdapterError, ConfigError, DataError, PeftRankError

try:
    from fastapi import Depends, FastAPI, Query, Request, Response
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import FileResponse, HTMLResponse
    from fastapi.staticfiles import StaticFiles
    from prometheus_client import CONTENT_TYPE_LATEST
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ModuleNotFoundError as error:
    raise ConfigError(
        f'the server needs {error.name}, which is not installed; run: pip install "peftrank[serve]"'
    ) from error

from peftrank.serving import _openapi
from peftrank.serving._schemas import LimitError
from peftrank.serving.auth import AuthError, check_token
from peftrank.serving.batching import OverloadedError, StoppedError, TooLargeError
from peftrank.serving.history import History, HistoryError
from peftrank.serving.logs import log, log_exception
from peftrank.serving.service import Service, StartingError, to_json
from peftrank.serving.settings import ServeSettings

if TYPE_CHECKING:
    from peftrank.ranker import Ranker

T = TypeVar("T")
_PAGE = Path(__file__).parent / "page"
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)
_GONE = 499
"""What is counted for a client that did not wait; nobody gets it."""
_ERROR = "peftrank.error"
"""Where a request's scope says which type of error it was answered with."""
_FAULT = "the server has a fault; its log says where"
_NO_ADAPTER = "the domain's adapter cannot be used; the server's log says why"
_NO_HISTORY = (
    "the store of histories cannot be used now, and nothing was changed. Try again later; slates "
    "that bring their own history are ranked all the same."
)


def create_app(
    ranker: Ranker | Callable[[], Ranker],
    settings: ServeSettings | None = None,
    *,
    history: History | None = None,
    domains: Sequence[str] | None = None,
) -> FastAPI:
    """Returns the app that serves a ranker; what the store makes active is loaded as it serves.

    Args:
        ranker: With the adapters to start with; or a function that makes one, called in the
            background of a server that answers 503 until then, and the active adapters are loaded.
        settings: Limits and tokens.
        history: Where users' events are kept; None: requests bring their histories. Closed with
            the app.
        domains: Those to keep at the store's active version; None: all that fit the base.
    """
    settings = settings or ServeSettings()
    service = Service(ranker, settings, history, domains)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="PeftRank",
        version=__version__,
        description=_openapi.DESCRIPTION,
        docs_url=None,  # FastAPI's own page needs another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.add_middleware(_Edge, service=service)
    for kind in (HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _refused)
    _add_rank_routes(app, service)
    _add_adapter_routes(app, service)
    _add_other_routes(app, service)
    _openapi.describe(app)
    return app


def _allowed(service: Service, *, admin: bool = False) -> Any:  # noqa: ANN401 - FastAPI's own type
    """Returns what a route depends on: that the caller may, and the server can."""

    async def check(request: Request) -> None:
        check_token(service.settings, request.headers.get("authorization"), admin=admin)
        service.check_taken()

    return Depends(check)


def _add_rank_routes(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes
    as_user, as_admin = [_allowed(service)], [_allowed(service, admin=True)]

    @app.post("/v1/rank", dependencies=as_user, **_openapi.RANK)
    async def rank(request: Request) -> Response:
        body = await _body(request, limit)
        return _json(await _unless_gone(request, service.rank(body)))

    @app.post("/v1/events", dependencies=as_user, **_openapi.EVENTS)
    async def events(request: Request) -> Response:
        # Not given up with the client: it cannot know whether its events were kept.
        return _json(await service.store_events(await _body(request, limit)))

    @app.delete("/v1/users/{user_id:path}", dependencies=as_admin, **_openapi.FORGET)
    async def forget(user_id: str) -> Response:
        return _json(await service.forget(user_id))

    @app.get("/v1/samples/{domain}", dependencies=as_user, **_openapi.SAMPLES)
    async def samples(domain: str, n: Annotated[int, Query(ge=1, le=100)] = 10) -> Response:
        slates = await service.sample(domain, n)
        if slates is None:
            raise HTTPException(404, "this domain has no sample")
        return _json({"slates": slates})


def _add_adapter_routes(app: FastAPI, service: Service) -> None:
    limit = service.settings.max_body_bytes
    as_user, as_admin = [_allowed(service)], [_allowed(service, admin=True)]

    @app.get("/v1/adapters", dependencies=as_user, **_openapi.ADAPTERS)
    async def adapters() -> Response:
        return _json(await service.adapters())

    @app.post("/v1/adapters/{domain}/load", dependencies=as_admin, **_openapi.LOAD)
    async def load(domain: str, request: Request) -> Response:
        body = await _body(request, limit)
        return _json(await _changed(service.load, domain, body))

    @app.post("/v1/adapters/{domain}/unload", dependencies=as_admin, **_openapi.UNLOAD)
    async def unload(domain: str) -> Response:
        return _json(await _changed(service.unload, domain))

    @app.post("/v1/adapters/{domain}/activate", dependencies=as_admin, **_openapi.ACTIVATE)
    async def activate(domain: str, request: Request) -> Response:
        body = await _body(request, limit)
        return _json(await _changed(service.activate, domain, body))


def _add_other_routes(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", **_openapi.HEALTH)
    async def healthz() -> Response:
        if not service.alive:
            raise RuntimeError("the scoring thread has ended")
        return _json({"status": "ok"})

    @app.get("/readyz", **_openapi.READY)
    async def readyz() -> Response:
        service.check_ready()
        return _json({"status": "ready", "domains": service.domains})

    @app.get("/metrics", **_openapi.METRICS)
    async def metrics() -> Response:
        return Response(service.figures(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_openapi.page(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return FileResponse(_PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=_PAGE))


class _Edge:
    """The outermost layer: time limit, headers, and the counting and logging of every request."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *_HEADERS]
            await send(message)

        try:
            refusal = await self._run(scope, receive, send_on)
            # Where an answer has begun, it cannot become another; uvicorn ends the connection.
            if refusal is not None and not status:
                await refusal(scope, receive, send_on)
        except ClientDisconnect:
            status = _GONE
        finally:
            self._note(scope, status, time.perf_counter() - started)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> Response | None:
        """Runs the application, and returns what is to be answered where it raised."""
        seconds, under_way = self._service.settings.timeout_seconds, self._service.under_way
        try:
            async with asyncio.timeout(seconds) as limit:
                under_way.add(limit)
                try:
                    await self._app(scope, receive, send)
                finally:
                    under_way.remove(limit)
            return None
        except ClientDisconnect:
            raise
        except TimeoutError:
            if self._service.state == "stopping":
                return _refusal(scope, StoppedError("the server is shutting down"))
            message = f"the request took longer than {seconds:g} s and was given up"
            return _error(scope, 504, "timeout", message)
        except PeftRankError as error:
            return _refusal(scope, error)
        except Exception as error:
            log_exception("request_failed", error, route=_route(scope))
            return _error(scope, 500, "internal", _FAULT)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route, kind = _route(scope), scope.get(_ERROR)
        self._service.metrics.requests.labels(route, str(status)).observe(seconds)
        if kind is not None:
            self._service.metrics.errors.labels(kind).inc()
        log(
            logging.INFO if route.startswith("/v1") else logging.DEBUG,
            "request",
            method=scope["method"],
            route=route,
            status=status,
            ms=round(1000 * seconds, 1),
            **({} if kind is None else {"error": kind}),
        )


class RefusedError(PeftRankError):
    """What an admin asked for cannot be done as things are."""


async def _changed(change: Callable[..., Awaitable[T]], domain: str, *rest: bytes) -> T:
    """Returns the answer to an admin call, whose messages may tell more than others."""
    try:
        store.check_domain(domain)
    except AdapterError as error:
        raise DataError(str(error)) from None
    try:
        return await change(domain, *rest)
    except AdapterError as error:
        raise RefusedError(str(error)) from error


async def _refused(request: Request, error: Exception) -> Response:
    return _refusal(request.scope, error)


def _refusal(scope: Scope, error: Exception) -> Response:  # noqa: C901 - one line per kind
    """Returns the answer to what was refused or failed on purpose."""
    match error:
        case DataError():
            return _error(scope, 400, "data", str(error))
        case RequestValidationError():
            first = error.errors()[0]
            return _error(scope, 400, "data", f"{first['loc'][-1]}: {first['msg']}")
        case HTTPException():
            return _error(scope, error.status_code, "data", error.detail, error.headers)
        case LimitError():
            return _error(scope, error.status, "limit", str(error))
        case TooLargeError():
            return _error(scope, 413, "limit", str(error))
        case AuthError(status=401):
            return _error(scope, 401, "auth", str(error), {"WWW-Authenticate": "Bearer"})
        case AuthError():
            return _error(scope, error.status, "auth", str(error))
        case OverloadedError():
            headers = {"Retry-After": str(error.retry_after_seconds)}
            return _error(scope, 429, "overloaded", str(error), headers)
        case StartingError():
            return _error(scope, 503, "overloaded", str(error), {"Retry-After": "1"})
        case StoppedError():
            headers = {"Retry-After": "1", "Connection": "close"}
            return _error(scope, 503, "overloaded", str(error), headers)
        case RefusedError():
            return _error(scope, 400, "adapter", str(error))
        case ConfigError():
            return _error(scope, 400, "config", str(error))
    # Messages from here on name files and hosts of the server.
    log(logging.ERROR, "request_failed", route=_route(scope), reason=str(error))
    if isinstance(error, HistoryError):
        return _error(scope, 503, "internal", _NO_HISTORY, {"Retry-After": "1"})
    if isinstance(error, AdapterError):
        return _error(
            scope, 500, "adapter", "the adapter cannot be used; the server's log says why"
        )
    return _error(scope, 500, "internal", _FAULT)


def _error(
    scope: Scope, status: int, kind: str, message: str, headers: Mapping[str, str] | None = None
) -> Response:
    scope[_ERROR] = kind
    body = to_json({"error": {"type": kind, "message": message}})
    return Response(body, status, headers, media_type="application/json")


def _json(value: Any) -> Response:  # noqa: ANN401 - any JSON value, or its bytes
    body = value if isinstance(value, bytes) else to_json(value)
    return Response(body, media_type="application/json")


async def _body(request: Request, limit: int) -> bytes:
    """Returns a request's body; LimitError as soon as it is too large, whatever it declared."""
    too_large = LimitError(f"the body is larger than {limit} bytes; send fewer slates", 413)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
    return b"".join(chunks)


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns what the work does; gives it up, with ClientDisconnect, when the client leaves."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _route(scope: Scope) -> str:
    """Returns the pattern that a request's path fits: a label that callers cannot invent."""
    found = getattr(scope.get("route"), "path", None)
    if found is not None:
        return str(found)
    return "/page" if scope["path"].startswith(f"{scope.get('root_path', '')}/page/") else "other"
