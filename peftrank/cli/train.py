"""`peftrank train`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from peftrank.cli import options


def command(
    domain: options.Domain = None,
    method: Annotated[
        str | None,
        typer.Option(help="lora, adalora, adapter, ia3, top-layers, full, or peft:NAME."),
    ] = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    output: Annotated[Path, typer.Option(help="The adapter store.")] = Path("adapters"),
    set_: options.Set = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue a run: its folder or one of its checkpoints.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Train a domain's adapter and put it into the store as its new active version."""
    from peftrank.cli.settings import settings_of
    from peftrank.errors import ConfigError
    from peftrank.training import train
    from peftrank.training.checkpoint import load

    given = [domain, method, config, base, data, *(set_ or [])]
    if resume is not None:
        if any(value is not None for value in given):
            raise ConfigError("--resume continues a run with its own configuration; give only it")
        saved = load(resume)
        settings = saved.config
        output = saved.run.parent.parent.parent  # <store>/<domain>/.runs/<run>
    else:
        settings = settings_of(
            domain=domain, method=method, config=config, base=base, data=data, set_=set_
        )
    if settings.training.micro_tokens == "auto":
        from peftrank.doctor import settled

        settings = settled(settings)
        typer.echo(f"training.micro_tokens: {settings.training.micro_tokens}", err=True)
    path = train(settings, output=output, resume=resume, progress=not as_json)
    if os.environ.get("RANK", "0") != "0":  # of several processes one speaks
        return
    metrics = json.loads((path / "peftrank.json").read_text(encoding="utf-8"))["metrics"]
    if as_json:
        typer.echo(json.dumps({"path": str(path), "metrics": metrics}))
        return
    shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    typer.echo(f"saved and activated {path} ({shown})")
