"""`peftrank adapters`: look at the store, change which version is active, share by the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftrank.cli import options

app = typer.Typer(
    help="List, check, activate and share the adapters of a store.", no_args_is_help=True
)
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
def show(
    source: Source,
    store: options.Store = STORE,
    ranks: Annotated[
        Path | None,
        typer.Option(help="Draw the rank of each layer's modules into this file (.png, .svg)."),
    ] = None,
) -> None:
    """Print what is known about an adapter, as JSON."""
    from peftrank.store import describe, resolve

    found = describe(resolve(source, store))
    if ranks is not None:
        from peftrank.rank_map import draw_ranks

        title = f"{found['domain']}, {found['method']['name']}"
        draw_ranks(found.get("ranks", {}), ranks, title=title)
    typer.echo(json.dumps(found, indent=2))


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


@app.command()
def export(
    source: Source,
    output: Annotated[Path, typer.Argument(help="A new folder.")],
    store: options.Store = STORE,
    merge: Annotated[
        bool, typer.Option("--merge", help="Write base and adapter as one unquantized model.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of merged weights: float32, bfloat16 or float16.")
    ] = "float32",
    data: options.Data = None,
    limit: Annotated[int, typer.Option(help="Test slates to measure the drift on.", min=1)] = 50,
    base: Annotated[str | None, typer.Option(help="Absent: the base it was trained on.")] = None,
) -> None:
    """Write an adapter for other tools: PEFT's files, or with --merge a whole model."""
    from peftrank.store import load_adapter, resolve

    folder = resolve(source, store)
    manifest = load_adapter(folder).manifest
    if not merge:
        from peftrank.export import copy

        copy(folder, output)
        typer.echo(f"{output}: PEFT's files, and the readout's weights beside them")
        return
    from peftrank.base import load_base
    from peftrank.cli.settings import slates_of
    from peftrank.config import Config, DataConfig
    from peftrank.export import check_mergeable
    from peftrank.export import merge as merged
    from peftrank.training.data import folder_data

    check_mergeable(folder)  # before the base is loaded, which takes longer
    name = base or manifest["base"]["name"]
    files = DataConfig() if data is None else folder_data(data)
    slates = slates_of(Config(domain=manifest["domain"], data=files), "test")[:limit]
    revision = None if base else manifest["base"]["revision"]
    loaded = load_base(name, quantization="none", compute_dtype="float32", revision=revision)
    drift = merged(folder, output, base=loaded, slates=slates, dtype=dtype)
    typer.echo(
        f"{output}: merged in {dtype}. On {drift.slates} slates scores differ by at most "
        f"{drift.largest:.2g} (they spread by {drift.spread:.2g}); Kendall's tau "
        f"{drift.kendall_tau:.4f}; another best candidate on {drift.top_changed}"
    )


@app.command()
def push(
    source: Source,
    repo: Annotated[str, typer.Argument(metavar="USER/REPO", help="On the Hugging Face Hub.")],
    store: options.Store = STORE,
    license_: Annotated[
        str | None,
        typer.Option("--license", help="Its identifier on the Hub; absent: the card's."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make the repository a private one.")
    ] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Absent: main.")
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded; contact nothing.")
    ] = False,
) -> None:
    """Upload an adapter to the Hugging Face Hub and print the commit's address."""
    from peftrank import hub
    from peftrank.store import resolve

    files = hub.prepare(resolve(source, store), repo, license=license_)
    if dry_run:
        for name, data in files.items():
            typer.echo(f"{len(data):>12,}  {name}")
        typer.echo(f"{sum(map(len, files.values())):>12,}  bytes for {repo}; nothing was uploaded")
        return
    typer.echo(hub.push(files, repo, private=private, branch=branch, message=message))


@app.command()
def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="USER/REPO[@REVISION]", help="Revision: a branch, tag or commit; absent: main."
        ),
    ],
    store: options.Store = STORE,
    domain: Annotated[
        str | None, typer.Option(help="Keep it under this name; absent: the one it was made for.")
    ] = None,
    activate: Annotated[
        bool, typer.Option("--activate/--no-activate", help="Put it into use.")
    ] = True,
    max_bytes: Annotated[
        int, typer.Option(help="Refuse a larger adapter before the download.", min=1)
    ] = 2**30,
    allow_code: Annotated[
        bool,
        typer.Option("--allow-code", help="Accept a readout that is code outside PeftRank."),
    ] = False,
) -> None:
    """Download an adapter from the Hugging Face Hub, check it, and add it to the store."""
    from peftrank import hub
    from peftrank.store import describe

    path = hub.pull(
        name, store, domain=domain, activate=activate, max_bytes=max_bytes, allow_code=allow_code
    )
    found = describe(path)
    done = "saved and activated" if activate else "saved"
    typer.echo(
        f"{done} {path}: commit {found['hub']['commit']}, {found['method']['name']} for base "
        f"{found['base']['name']}"
    )
