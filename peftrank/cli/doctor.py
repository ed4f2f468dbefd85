"""`peftrank doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftrank.cli import options

if TYPE_CHECKING:
    from peftrank.config import Config
    from peftrank.doctor import MemoryPlan


def command(
    domain: options.Domain = None,
    method: Annotated[
        str | None,
        typer.Option(help="lora, adalora, adapter, ia3, top-layers, full, or peft:NAME."),
    ] = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    set_: options.Set = None,
    device: Annotated[
        str | None, typer.Option(help="Plan for cpu or cuda; absent: what is here.")
    ] = None,
    gpus: Annotated[int, typer.Option(help="Processes to plan for.", min=1)] = 1,
    sharded: Annotated[
        bool, typer.Option("--sharded", help="The base is sharded over them (FSDP2).")
    ] = False,
    architecture: Annotated[
        Path | None, typer.Option(help="A config.json, for a base that is not here.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Say what works on this machine and, for a domain, how much memory training will take."""
    from peftrank.cli.settings import settings_of
    from peftrank.doctor import machine, memory_plan, settled
    from peftrank.errors import ConfigError

    found = machine()
    plan = None
    if domain is not None or config is not None:
        settings = settings_of(
            domain=domain, method=method, config=config, base=base, data=data, set_=set_
        )
        device = device or found["device"]
        if device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {device}: expected cpu or cuda")
        if settings.training.micro_tokens == "auto" and device == found["device"]:
            settings = settled(settings, device=device)
            typer.echo(f"training.micro_tokens: {settings.training.micro_tokens}", err=True)
        plan = memory_plan(
            settings, device=device, processes=gpus, sharded=sharded, architecture=architecture
        )
    elif any(value is not None for value in (method, base, data, architecture)) or set_:
        raise ConfigError("to plan the memory of a training, also give --domain or --config")
    if as_json:
        shown = {"machine": found, "memory": None if plan is None else plan.as_json()}
        typer.echo(json.dumps(shown, indent=2))
        return
    _show_machine(found)
    if plan is not None:
        _show_plan(plan, found, settings)


def _show_machine(found: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    typer.echo(f"Python {found['python']} on {found['platform']}\n{versions}")
    gpus = ", ".join(found["gpus"]) or "no GPU"
    memory = "" if found["memory_bytes"] is None else f", {found['memory_bytes'] / 2**30:.0f} GiB"
    typer.echo(f"{found['cores']} cores{memory}; {gpus}; computes in {found['compute_dtype']}")
    for name, state in found["quantizations"].items():
        typer.echo(f"  base.quantization={name}: {state}")
    missing = [name for name, there in found["extras"].items() if not there]
    if missing:
        typer.echo(f"  not installed: pip install 'peftrank[{','.join(missing)}]'")


def _show_plan(plan: MemoryPlan, found: dict[str, Any], settings: Config) -> None:
    source = "the largest of the first steps" if plan.measured else "full rows"
    typer.echo(
        f"\nMemory of a training process, MiB (a pass of {plan.rows} x {plan.tokens} tokens, "
        f"{source})"
    )
    for name, size in plan.as_json().items():
        if name not in ("rows", "tokens", "measured") and size:
            typer.echo(f"  {name:12} {size / 2**20:8,.0f}")
    micro_tokens = settings.training.micro_tokens
    if micro_tokens != "auto" and plan.measured and plan.rows * plan.tokens > micro_tokens:
        typer.echo(
            f"  One slate is more than training.micro_tokens={micro_tokens}, and its loss needs "
            "all its scores. Fewer candidates in a slate take less, or "
            "training.gradient_checkpointing=true."
        )
    memory = found["memory_bytes"]
    if found["device"] == "cpu" and memory is not None and plan.total > 0.9 * memory:
        typer.echo("  This machine has less. Lower training.micro_tokens or method.layers.")
