"""A server process: listens, loads the base and the adapters, and ends in good order."""

from __future__ import annotations

import functools
import logging
import math
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from peftrank import store as stores
from peftrank.base import load_base
from peftrank.errors import AdapterError, ConfigError
from peftrank.ranker import Ranker
from peftrank.serving.app import create_app
from peftrank.serving.history import open_history
from peftrank.serving.logs import log, set_up
from peftrank.serving.service import Service
from peftrank.serving.settings import ServeSettings

try:
    import uvicorn
except ModuleNotFoundError as error:
    raise ConfigError(
        'the server needs uvicorn, which is not installed; run: pip install "peftrank[serve]"'
    ) from error

PREFIX_BYTES = 256 * 2**20
_KEEP_ALIVE_SECONDS = 75  # longer than usual load balancers keep an idle connection
_LAST_SECONDS = 5
"""For the last answers to leave."""
_READ_SECONDS = 0.2
"""For what has come through the port to be read."""


def serve(
    *,
    store: Path = Path("adapters"),
    domains: Sequence[str] | None = None,
    base: str | None = None,
    quantization: str | None = None,
    device: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    history: str | None = "sqlite:///history.db",
    device_bytes: int | None = None,
    host_bytes: int | None = 0,
    prefix_bytes: int = PREFIX_BYTES,
    log_level: str = "info",
    settings: ServeSettings | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; requests under way are answered first, then it returns.

    The port answers at once; /readyz is 503 until the base and the adapters are loaded.

    Args:
        store: Where the adapters are.
        domains: Those to serve, all of which must load; None: all that have an active version and
            fit the base, also those that appear later. Others are logged.
        base: Absent: the base of the first domain's adapter.
        quantization: Absent: how that adapter's base was loaded.
        device: Of the base.
        host: Address to listen at.
        port: 0 for a free one; the log says which.
        history: URL of the store of histories, see `open_history`; None: requests bring theirs.
        device_bytes: Budget of adapter weights on the device; None: all.
        host_bytes: Budget of those kept in host memory when they leave it; None: all.
        prefix_bytes: Budget of what is kept on the device of users' histories; 0: nothing.
        log_level: debug, info, warning or error.
        settings: Limits and tokens.

    Raises:
        ConfigError: the store has nothing to serve, the history's URL names no store, or the
            address is taken.
        AdapterError: a domain that was asked for cannot be loaded.
        BaseModelError: the base cannot be loaded.
        HistoryError: the history's file cannot be opened.
    """
    settings = settings or ServeSettings()
    set_up(log_level)
    listener = _listen(host, port)  # before anything that takes long
    with listener:
        trained = wanted_base(store, domains, base, quantization)
        kept = None if history is None else open_history(history)
        make = functools.partial(
            load_ranker, trained, device=device, store=store, device_bytes=device_bytes,
            host_bytes=host_bytes, prefix_bytes=prefix_bytes,
        )  # fmt: skip
        app = create_app(make, settings, history=kept, domains=domains)
        config = uvicorn.Config(
            app,
            http="h11",  # bounds the headers of a request: httptools keeps whatever is sent
            log_config=None,
            ws="none",
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_SECONDS,
        )
        shown = f"[{host}]" if ":" in host else host
        log(logging.INFO, "listening", url=f"http://{shown}:{listener.getsockname()[1]}")
        service: Service = app.state.service
        _Server(config, service, listener).run(sockets=[listener])
    if service.failure is not None:
        raise service.failure
    log(logging.INFO, "stopped")


class _Server(uvicorn.Server):
    """Ends when what is under way is done, not at the signal; and then in good order, status 0.

    Whoever has a connection gets an answer: the port is closed when nobody waits at it, and what
    came in by then is answered before uvicorn closes the connections.
    """

    def __init__(self, config: uvicorn.Config, service: Service, listener: socket.socket):
        super().__init__(config)
        self._service, self._listener = service, listener
        self._earliest, self._latest = math.inf, math.inf
        self._closing, self._closed = math.inf, math.inf
        """Since when the port takes nobody new, and since when it is closed."""
        service.on_failure = self._leave

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to stop; uvicorn calls it on SIGTERM and SIGINT. The second time: at once."""
        if self._service.state == "stopping":
            self._earliest = self._latest = time.monotonic()
            return
        self._service.drain()
        now, settings = time.monotonic(), self._service.settings
        self._earliest = now + settings.drain_seconds
        self._latest = now + settings.drain_seconds + settings.grace_seconds

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end; uvicorn calls it ten times a second."""
        now = time.monotonic()
        if now >= self._latest:
            self._service.give_up()
        if now >= self._earliest and not self._service.finishing:
            self._close_port(now)
        answered = now >= self._closed + _READ_SECONDS and not self._service.under_way
        if answered or now >= self._latest + _LAST_SECONDS:
            self._leave()
        return await super().on_tick(counter)

    def _close_port(self, now: float) -> None:
        if self._closing == math.inf:
            self._closing = now
            self._listener.listen(0)  # who comes now is not let in to wait, but told to come again
        elif self._closed == math.inf and (
            now >= self._closing + _LAST_SECONDS or not _waited_for(self._listener)
        ):
            self._closed = now
            for server in self.servers:
                server.close()

    def _leave(self) -> None:
        self.should_exit = True


def _waited_for(listener: socket.socket) -> bool:
    """Returns whether a connection waits to be accepted."""
    return bool(select.select([listener], [], [], 0)[0])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror or error}. Choose another --port."
        ) from error


def wanted_base(
    store: Path, domains: Sequence[str] | None, base: str | None, quantization: str | None
) -> dict[str, Any]:
    """Returns what `load_base` is told: the base asked for, else that of the first sound adapter.

    Raises:
        ConfigError: neither.
        AdapterError: a domain that was asked for has no sound active version.
    """
    wanted: dict[str, Any] = {}
    for domain in stores.domains(store) if domains is None else domains:
        try:
            manifest = stores.load_adapter(stores.resolve(domain, store)).manifest
        except AdapterError:
            if domains is not None:
                raise
            continue  # the watcher raises its alarm
        wanted = stores.base_arguments(manifest)
        break
    if base is not None and base != wanted.get("name"):
        wanted = {"name": base}
    if not wanted:
        raise ConfigError(
            f"the store {store} has no sound active adapter that tells the base; make one with "
            "peftrank train, name another store with --store, or a base with --base"
        )
    return wanted if quantization is None else {**wanted, "quantization": quantization}


def load_ranker(
    wanted: dict[str, Any],
    *,
    device: str,
    store: Path,
    device_bytes: int | None,
    host_bytes: int | None,
    prefix_bytes: int,
) -> Ranker:
    """Returns a ranker on the base that `wanted` describes, with no domain loaded."""
    log(logging.INFO, "loading_base", base=wanted["name"])
    base = load_base(**wanted, device=device)
    return Ranker(
        base,
        store=store,
        device_bytes=device_bytes,
        host_bytes=host_bytes,
        prefix_bytes=prefix_bytes,
    )
