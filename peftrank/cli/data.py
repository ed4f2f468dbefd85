"""`peftrank data`: raw logs become slates, and what slates hold."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftrank.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from peftrank.inspection import CountTokens

app = typer.Typer(help="Turn logs into slates, and look at slates.", no_args_is_help=True)


@app.command("prepare")
def prepare_command(
    path: Annotated[Path, typer.Option(help="The raw files: a folder or a file.")],
    output: Annotated[Path, typer.Option(help="Folder the slates are written to.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="csv, mind, recbole, amazon, movielens, microlens, lastfm, lists, slates.",
        ),
    ],
    domain: options.Domain = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="leave-one-out, time, users, or given (as the raw files say). Absent: given "
            "where they do, users for other lists really shown, else leave-one-out."
        ),
    ] = None,
    valid: Annotated[
        float | None, typer.Option(help="Below 1: share held out for validation; else how many.")
    ] = None,
    test: Annotated[
        float | None, typer.Option(help="Below 1: share held out for testing; else how many.")
    ] = None,
    negatives: Annotated[
        str, typer.Option(help="uniform, popularity, category, or run:FILE (a TREC run).")
    ] = "uniform",
    n_negatives: Annotated[int, typer.Option(help="Negatives in each list.", min=1)] = 19,
    targets_per_user: Annotated[
        int, typer.Option(help="Training lists of each user at most, latest first.", min=1)
    ] = 1,
    labels: Annotated[str, typer.Option(help="binary, or rating (graded).")] = "binary",
    min_rating: Annotated[
        float | None, typer.Option(help="Interactions below it are neither targets nor history.")
    ] = None,
    history_length: Annotated[int, typer.Option(help="The newest history items kept.", min=0)] = 50,
    max_slates: Annotated[
        int | None, typer.Option(help="Training slates at most; users at random.", min=1)
    ] = None,
    features: Annotated[
        str,
        typer.Option(
            help="Comma-separated: popularity, click_rate, item_knn, transition, item_embedding, "
            "text_overlap, category, friends, recency, retriever."
        ),
    ] = "",
    as_of: Annotated[
        str,
        typer.Option(
            help="What features see: time (before the slate), part (the training part without "
            "the slate's user), or auto (time where there is one)."
        ),
    ] = "auto",
    category_field: Annotated[
        str | None, typer.Option(help="Item field with the category; several separated by commas.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="A TREC run with the scores of the retriever feature.")
    ] = None,
    parquet: Annotated[bool, typer.Option("--parquet", help="Parquet, not JSON lines.")] = False,
    on_error: Annotated[
        str,
        typer.Option(help="raise, or skip: leave malformed rows out, written to rejects.jsonl."),
    ] = "raise",
    seed: Annotated[int, typer.Option(help="Fixes every random choice.")] = 0,
    json_: options.JsonFlag = False,
) -> None:
    """Turn a raw log into train, valid and test slates with candidate features."""
    from peftrank import plugins
    from peftrank._tables import Settings
    from peftrank.formats._log import Rejects
    from peftrank.prepare import prepare

    settings = Settings(
        split=split,
        valid=valid,
        test=test,
        negatives=negatives,
        n_negatives=n_negatives,
        targets_per_user=targets_per_user,
        labels=labels,
        min_rating=min_rating,
        history_length=history_length,
        max_slates=max_slates,
        features=tuple(name.strip() for name in features.split(",") if name.strip()),
        as_of=as_of,
        category_field=category_field,
        run=run,
        users_are_items=format_ == "lastfm",
        seed=seed,
        on_error=on_error,
        domain=domain,
        parquet=parquet,
    )
    read = plugins.load("formats", format_)
    rejects = Rejects(output / "rejects.jsonl" if on_error == "skip" else None)
    log = read(path, on_error=on_error, rejects=rejects)
    with _progress() as progress:
        meta = prepare(log, output, settings, progress)
    if json_:
        typer.echo(json.dumps(meta, ensure_ascii=False))
        return
    for title in ("counts", "dropped", "notes"):
        typer.echo(f"{title}: {json.dumps(meta[title])}")
    typer.echo(f"features as of {meta['as_of']}: {', '.join(meta['features']) or 'none'}")
    typer.echo(f"written to {output}, fingerprint {meta['fingerprint'][:16]}")


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A folder that `data prepare` wrote, or a file.")],
    examples: Annotated[int, typer.Option(help="Slates shown of each part.", min=0)] = 1,
    tokenizer: Annotated[
        str | None, typer.Option(help="Count tokens with this tokenizer: a folder or Hub id.")
    ] = None,
    json_: options.JsonFlag = False,
) -> None:
    """Show what slates hold: counts, lengths, labels, coverage, examples."""
    from peftrank.inspection import inspect

    count = None if tokenizer is None else _token_counter(tokenizer)
    report = inspect(path, examples=examples, count_tokens=count)
    if json_:
        typer.echo(json.dumps(report, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    for name, part in report["parts"].items():
        _print_part(console, name, part)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Yields what shows how many slates are written, and the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing slates", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _token_counter(name: str) -> CountTokens:
    from transformers import AutoTokenizer

    from peftrank.errors import ConfigError

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a tokenizer from {name!r}: {error}") from error
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _print_part(console: Console, name: str, part: Mapping[str, Any]) -> None:
    from rich.table import Table

    table = Table(title=name, title_justify="left", show_header=False)
    for key, value in part.items():
        if key == "examples":
            continue
        text = value
        if isinstance(value, Mapping):
            text = "  ".join(f"{k}: {v}" for k, v in value.items()) or "none"
        table.add_row(key.replace("_", " "), str(text))
    console.print(table)
    for example in part["examples"]:
        console.print(f"slate {example['slate_id']}", markup=False)
        for line in example["history"]:
            console.print(f"  - {line}", markup=False)
        for row in example["candidates"]:
            console.print(f"  [{row['label']}] {row['text']}", markup=False)
