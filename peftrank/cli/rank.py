"""`peftrank rank`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftrank.cli import options

if TYPE_CHECKING:
    from peftrank.config import Config
    from peftrank.ranker import Ranker
    from peftrank.types import RankedList, Slate


def command(
    domain: options.Domain = None,
    input_: Annotated[
        Path | None, typer.Option("--input", help="Slates, JSON lines or Parquet.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Rankings: .jsonl, or .run for a TREC run.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="A folder, domain or domain@version; absent: the active.")
    ] = None,
    index: Annotated[
        int | None, typer.Option(help="Instead of a file: show one slate of the test part.", min=0)
    ] = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    store: options.Store = Path("adapters"),
    k: Annotated[int | None, typer.Option("-k", help="Keep the best k.", min=1)] = None,
    set_: options.Set = None,
) -> None:
    """Rank the candidates of slates with a domain's adapter."""
    from peftrank.cli.settings import settings_of, slate_at
    from peftrank.errors import ConfigError
    from peftrank.formats.slates import read_slates, write_rankings

    settings = settings_of(domain=domain, config=config, base=base, data=data, set_=set_)
    if input_ is not None and output is not None and index is None:
        ranker, name = _loaded(settings, adapter, store, base, set_)
        slates = read_slates(input_, items=settings.data.items)
        count = write_rankings(output, ranker.rank_stream(slates, domain=name, k=k))
        typer.echo(json.dumps({"slates": count, "output": str(output)}))
    elif index is not None and input_ is None and output is None:
        slate = slate_at(settings, "test", index)
        ranker, name = _loaded(settings, adapter, store, base, set_)
        _show(slate, ranker.rank(slate, domain=name, k=k), settings)
    else:
        raise ConfigError("give --input FILE and --output FILE, or --index N to look at one slate")


def _loaded(
    settings: Config, adapter: str | None, store: Path, base: str | None, set_: list[str] | None
) -> tuple[Ranker, str]:
    from peftrank.cli.settings import find_adapter, ranker_for

    folder = find_adapter(adapter, settings, store)
    ranker = ranker_for(settings, store, adapter=folder, base=base, set_=set_)
    return ranker, ranker.load_adapter(folder, domain=settings.domain)


def _show(slate: Slate, ranked: RankedList, settings: Config) -> None:
    from rich.console import Console
    from rich.table import Table

    items = {item.item_id: item for item in slate.candidates}
    labels = dict(zip(items, slate.labels or (), strict=bool(slate.labels)))
    console = Console()
    console.print(f"[bold]History of slate {slate.slate_id}, oldest first[/bold]")
    for item in slate.history[-settings.prompt.history_length :]:
        console.print("  - " + _text(item.fields, settings.prompt.fields), markup=False)
    table = Table("rank", "score", "label", "candidate", title="Ranking", title_justify="left")
    for rank, (item_id, score) in enumerate(
        zip(ranked.item_ids, ranked.scores, strict=True), start=1
    ):
        label = f"{labels[item_id]:g}" if slate.labels else ""
        table.add_row(
            str(rank), f"{score:.3f}", label, _text(items[item_id].fields, settings.prompt.fields)
        )
    console.print(table, markup=False)


def _text(fields: object, names: tuple[str, ...]) -> str:
    from collections.abc import Mapping

    from rich.markup import escape

    texts = fields if isinstance(fields, Mapping) else {}
    return escape(" | ".join(texts[name] for name in names if texts.get(name)))
