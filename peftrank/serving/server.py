"""A server process: loads the base and the adapters, listens, and ends in good order."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from peftrank import store as stores
from peftrank.base import load_base
from peftrank.errors import AdapterError, ConfigError, PeftRankError
from peftrank.ranker import Ranker
from peftrank.serving.app import Service, create_app
from peftrank.serving.history import open_history
from peftrank.serving.settings import ServeSettings

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_log = logging.getLogger(__name__)


def serve(
    *,
    store: Path = Path("adapters"),
    domains: Sequence[str] | None = None,
    base: str | None = None,
    quantization: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    history: str | None = "sqlite:///history.db",
    device_bytes: int | None = None,
    settings: ServeSettings | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT; requests in flight are answered first.

    Args:
        store: Where the adapters are.
        domains: Those to serve, all of which must load; None: all that have an active version and
            fit the base, others are logged.
        base: Absent: the base of the first domain's adapter.
        quantization: Absent: how that adapter's base was loaded.
        host: Address to listen at.
        port: 0 for a free one.
        history: URL of the store of histories, see `open_history`; None: requests bring theirs.
        device_bytes: Budget of adapter weights on the device.
        settings: Limits and tokens.

    Raises:
        ConfigError: the store has nothing to serve, the history's URL names no store, or the
            address is taken.
        AdapterError: a domain that was asked for cannot be loaded, or none can.
        BaseModelError: the base cannot be loaded.
    """
    settings = settings or ServeSettings()
    log_as_json()
    listener = _listen(host, port)  # before anything that takes long
    ranker = _ranker(store, domains, base, quantization, device_bytes)
    kept = None if history is None else open_history(history)
    app = create_app(
        ranker, settings, history=kept, domains=None if domains is None else tuple(domains)
    )
    service: Service = app.state.service
    failures = service.watcher.scan()
    if failures and (domains is not None or not ranker.domains):
        raise AdapterError(
            "; ".join(f"{name}: {error}" for name, error in failures.items())
        ) from next(iter(failures.values()))
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.grace_seconds),
    )
    url = f"http://{host}:{listener.getsockname()[1]}"
    _log.info("listening", extra={"url": url, "domains": list(ranker.domains)})
    _Server(config, service).run(sockets=[listener])
    ranker.close()


class _Server(uvicorn.Server):
    """On a signal, says that it is leaving for a moment before it closes the port."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:  # a second signal: at once
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        _log.info("shutting down")
        asyncio.get_running_loop().call_later(self._service.settings.drain_seconds, self._leave)

    def _leave(self) -> None:
        self.should_exit = True  # and not as killed by the signal: it ends in good order


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port}: {error.strerror or error}. Choose another --port."
        ) from error


def log_as_json() -> None:
    """Makes this package's log lines JSON objects on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    logger = logging.getLogger("peftrank.serving")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **{key: value for key, value in vars(record).items() if key not in _STANDARD},
        }
        if record.exc_info and record.exc_info[0] is not None:
            # Only where it failed and of what kind: messages may hold what users sent.
            line["exception"] = record.exc_info[0].__name__
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                code = trace.tb_frame.f_code
                line["where"] = f"{Path(code.co_filename).name}:{trace.tb_lineno} {code.co_name}"
        return json.dumps({key: value for key, value in line.items() if value is not None})


def _ranker(
    store: Path,
    domains: Sequence[str] | None,
    base: str | None,
    quantization: str | None,
    device_bytes: int | None,
) -> Ranker:
    named = list(domains) if domains is not None else list(stores.domains(store))
    if not named:
        raise ConfigError(
            f"the store {store} has no adapter to serve; make one with peftrank train, or name "
            "another with --store"
        )
    wanted: dict[str, object] = {}
    trained: PeftRankError | dict[str, object] | None = None
    for name in named:
        try:
            trained = stores.load_adapter(stores.resolve(name, store)).manifest["base"]
            break
        except AdapterError as error:
            if domains is not None:
                raise
            trained = error
    if isinstance(trained, dict):
        wanted = {k: trained[k] for k in ("name", "quantization", "double_quant", "revision")}
    if base is not None:
        wanted = {"name": base}
    if quantization is not None:
        wanted["quantization"] = quantization
    if "name" not in wanted:
        raise AdapterError(f"no adapter in {store} can be loaded: {trained}")
    return Ranker(load_base(**wanted), store=store, device_bytes=device_bytes)  # type: ignore[arg-type]
