"""`peftrank adapters`: look at the store and change which version is active."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftrank.cli import options

app = typer.Typer(help="List, check and activate the adapters of a store.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(help="A folder, a domain, or domain@version.")]
STORE = Path("adapters")


@app.command("list")
def list_(store: options.Store = STORE, as_json: options.JsonFlag = False) -> None:
    """List every domain's versions; the active one is marked."""
    from peftrank.store import active, describe, domains, versions

    rows = [
        {**describe(store / domain / version), "version": version, "active": version == current}
        for domain in domains(store)
        for current in (active(store, domain),)
        for version in versions(store, domain)
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        mark = "*" if row["active"] else " "
        typer.echo(
            f"{mark} {row['domain']}@{row['version']}  {row['method']['name']}  "
            f"{row['base']['name']}  "
            f"{row['bytes'] / 1024:.0f} KiB"
        )
    if not rows:
        typer.echo(f"no adapters in {store}; make one with peftrank train")


@app.command()
def show(source: Source, store: options.Store = STORE) -> None:
    """Print what is known about an adapter, as JSON."""
    from peftrank.store import describe, resolve

    typer.echo(json.dumps(describe(resolve(source, store)), indent=2))


@app.command()
def verify(source: Source, store: options.Store = STORE) -> None:
    """Check an adapter's files, hashes and shapes."""
    from peftrank.store import resolve
    from peftrank.store import verify as check

    path = resolve(source, store)
    check(path)
    typer.echo(f"{path}: all files present, hashes and shapes as the manifest says")


@app.command()
def activate(
    source: Annotated[str, typer.Argument(help="domain@version.")], store: options.Store = STORE
) -> None:
    """Make a version the active one (an older one: roll back)."""
    from peftrank.errors import AdapterError
    from peftrank.store import activate as put_into_use
    from peftrank.store import versions

    domain, _, version = source.partition("@")
    if not version:
        known = ", ".join(f"{domain}@{name}" for name in versions(store, domain))
        raise AdapterError(f"which version of {domain!r}? Give one of: {known or 'none is there'}")
    put_into_use(store, domain, version)
    typer.echo(f"{domain}: {version} is active")


@app.command()
def diff(first: Source, second: Source, store: options.Store = STORE) -> None:
    """Print how two adapters differ: configuration and weights by module, as JSON."""
    from peftrank.store import diff as difference
    from peftrank.store import resolve

    typer.echo(json.dumps(difference(resolve(first, store), resolve(second, store)), indent=2))
