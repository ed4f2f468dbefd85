"""`peftrank serve`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from peftrank.cli import options


class LogLevel(StrEnum):
    """How much is logged."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def command(
    store: options.Store = Path("adapters"),
    domains: Annotated[
        str | None,
        typer.Option(help="Those to serve, as news,video; absent: all with an active version."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Absent: the base of the first domain's adapter.")
    ] = None,
    quantization: Annotated[
        str | None,
        typer.Option(help="nf4, fp4, int8, none or stored; absent: as that adapter's base."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0: of all networks.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535)] = 8000,
    history: Annotated[
        str,
        typer.Option(help="Users' histories: sqlite:///FILE, redis://HOST:PORT/0, or none."),
    ] = "sqlite:///history.db",
    history_items: Annotated[
        int, typer.Option(help="Stored events that a slate without history gets.", min=1)
    ] = 100,
    batch_tokens: Annotated[
        int, typer.Option(help="Tokens scored together, at most.", min=1)
    ] = 8192,
    batch_seconds: Annotated[
        float, typer.Option(help="Fewer, where these would take longer than this.", min=0.001)
    ] = 0.5,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long an idle server waits for company.", min=0)
    ] = 5.0,
    queue_tokens: Annotated[
        int, typer.Option(help="Tokens that may wait; then 429.", min=1)
    ] = 262_144,
    max_requests: Annotated[int, typer.Option(help="Requests under way; then 429.", min=1)] = 256,
    timeout_seconds: Annotated[
        float, typer.Option(help="Until a request is answered 504.", min=0.001)
    ] = 30.0,
    drain_seconds: Annotated[
        float, typer.Option(help="After SIGTERM, how long the port says that it leaves.", min=0)
    ] = 1.0,
    grace_seconds: Annotated[
        float, typer.Option(help="After that, how long requests under way may take.", min=0)
    ] = 30.0,
    max_body_bytes: Annotated[int, typer.Option(help="Per request.", min=1)] = 2_000_000,
    max_slates: Annotated[int, typer.Option(help="Per request.", min=1)] = 256,
    max_candidates: Annotated[int, typer.Option(help="Per slate.", min=1)] = 1000,
    max_history: Annotated[int, typer.Option(help="History items per slate.", min=1)] = 1000,
    max_events: Annotated[int, typer.Option(help="Per request.", min=1)] = 1000,
    device_megabytes: Annotated[
        float | None, typer.Option(help="Adapter weights kept on the device; absent: all.", min=0)
    ] = None,
    host_megabytes: Annotated[
        float, typer.Option(help="Adapter weights kept in memory when they leave it.", min=0)
    ] = 0.0,
    prefix_megabytes: Annotated[
        float,
        typer.Option(help="Histories kept on the device as keys and values; 0: none.", min=0),
    ] = 256.0,
    watch_seconds: Annotated[
        float, typer.Option(help="How often the store is looked at; 0: never.", min=0)
    ] = 1.0,
    log_level: Annotated[LogLevel, typer.Option(help="How much is logged.")] = LogLevel.info,
) -> None:
    """Rank over HTTP, with a page to try it at /. Tokens: PEFTRANK_TOKEN, PEFTRANK_ADMIN_TOKEN."""
    from peftrank.serving import ServeSettings, serve

    settings = ServeSettings(
        batch_tokens=batch_tokens,
        batch_seconds=batch_seconds,
        max_wait_ms=max_wait_ms,
        queue_tokens=queue_tokens,
        max_requests=max_requests,
        timeout_seconds=timeout_seconds,
        drain_seconds=drain_seconds,
        grace_seconds=grace_seconds,
        watch_seconds=watch_seconds,
        max_body_bytes=max_body_bytes,
        max_slates=max_slates,
        max_candidates=max_candidates,
        max_history=max_history,
        max_events=max_events,
        history_items=history_items,
    )
    serve(
        store=store,
        domains=None if domains is None else [name.strip() for name in domains.split(",")],
        base=base,
        quantization=quantization,
        device=device,
        host=host,
        port=port,
        history=None if history == "none" else history,
        device_bytes=None if device_megabytes is None else int(device_megabytes * 2**20),
        host_bytes=int(host_megabytes * 2**20),
        prefix_bytes=int(prefix_megabytes * 2**20),
        log_level=log_level.value,
        settings=settings.with_tokens(),
    )
