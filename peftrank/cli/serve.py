"""`peftrank serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftrank.cli import options


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
        str | None, typer.Option(help="nf4, fp4, int8 or none; absent: as that adapter's base.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535)] = 8000,
    history: Annotated[
        str,
        typer.Option(help="Users' histories: sqlite:///FILE, redis://HOST:PORT/0, or none."),
    ] = "sqlite:///history.db",
    batch_tokens: Annotated[int, typer.Option(help="Tokens scored together.", min=1)] = 8192,
    max_wait_ms: Annotated[
        float, typer.Option(help="How long an idle server waits for company.", min=0)
    ] = 5.0,
    queue_tokens: Annotated[
        int, typer.Option(help="Tokens that may wait; then 429.", min=1)
    ] = 262_144,
    timeout_seconds: Annotated[
        float, typer.Option(help="Until a request is answered 504.", min=0.001)
    ] = 30.0,
    max_candidates: Annotated[int, typer.Option(help="Per slate.", min=1)] = 1000,
    device_megabytes: Annotated[
        float | None, typer.Option(help="Adapter weights kept on the device; absent: all.")
    ] = None,
    watch_seconds: Annotated[
        float, typer.Option(help="How often the store is looked at; 0: never.", min=0)
    ] = 1.0,
) -> None:
    """Rank over HTTP, with a page to try it at /. Tokens: PEFTRANK_TOKEN, PEFTRANK_ADMIN_TOKEN."""
    from peftrank.serving import ServeSettings, serve

    serve(
        store=store,
        domains=None if domains is None else [name.strip() for name in domains.split(",")],
        base=base,
        quantization=quantization,
        host=host,
        port=port,
        history=None if history == "none" else history,
        device_bytes=None if device_megabytes is None else int(device_megabytes * 2**20),
        settings=ServeSettings(
            batch_tokens=batch_tokens,
            max_wait_ms=max_wait_ms,
            queue_tokens=queue_tokens,
            timeout_seconds=timeout_seconds,
            max_candidates=max_candidates,
            watch_seconds=watch_seconds,
        ).with_tokens(),
    )
