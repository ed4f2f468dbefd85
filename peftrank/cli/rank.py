"""`peftrank rank`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftrank.cli import options

if TYPE_CHECKING:
    from peftrank.config import Config
    from peftrank.ranker import Ranker
    from peftrank.serving.bulk import Adapter, Job
    from peftrank.types import RankedList, Slate

_REPORT_SECONDS = 60


class Engine(StrEnum):
    """Who ranks."""

    local = "local"
    ray = "ray"


def command(
    domain: options.Domain = None,
    input_: Annotated[
        Path | None,
        typer.Option("--input", help="Slates: JSON lines, Parquet, or a folder of such files."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Rankings: .jsonl, .parquet, .run for a TREC run, or a folder (a name without a "
            "dot) for Parquet shards, where a job that was stopped goes on by the same command."
        ),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="A folder, domain, domain@version, or user/repo[@revision] on the Hub; absent: "
            "the active."
        ),
    ] = None,
    index: Annotated[
        int | None, typer.Option(help="Instead of a file: show one slate of the test part.", min=0)
    ] = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    store: options.Store = Path("adapters"),
    k: Annotated[int | None, typer.Option("-k", help="Keep the best k.", min=1)] = None,
    engine: Annotated[
        Engine, typer.Option(help="local: this machine; ray: Ray Data, here or on RAY_ADDRESS.")
    ] = Engine.local,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes or Ray actors, each with a base in memory of its own. Absent: one per "
            "GPU; without GPUs one (Ray: one per node), which uses all cores.",
            min=1,
        ),
    ] = None,
    shard_slates: Annotated[
        int | None,
        typer.Option(
            help="Slates per shard: at most so many per worker are ranked again after a stop. "
            "Absent: 256.",
            min=1,
        ),
    ] = None,
    set_: options.Set = None,
) -> None:
    """Rank the candidates of slates with a domain's adapter."""
    from peftrank.cli.settings import settings_of, slate_at
    from peftrank.errors import ConfigError
    from peftrank.serving import bulk

    settings = settings_of(
        domain=domain, config=config, base=base, data=data, set_=set_, store=store
    )
    if index is not None and input_ is None and output is None:
        slate = slate_at(settings, "test", index)
        found = bulk.find_adapter(adapter or settings.domain, store)
        ranker = _loaded(found, _base(settings, found, base, set_), settings.domain)
        _show(slate, ranker.rank(slate, domain=settings.domain, k=k), settings)
        return
    if input_ is None or output is None or index is not None:
        raise ConfigError("give --input FILE and --output FILE, or --index N to look at one slate")
    is_folder = output.is_dir() or not output.suffix
    if not is_folder:
        bulk.check_file(output)
    found = bulk.find_adapter(adapter or settings.domain, store)
    job = bulk.Job(
        input=input_,
        output=(output if is_folder else output.with_name(f"{output.name}.shards")).absolute(),
        adapter=found,
        base=_base(settings, found, base, set_),
        domain=settings.domain,
        items=settings.data.items,
        k=k,
        shard_slates=shard_slates or bulk.SHARD_SLATES,
    )
    alone = engine is Engine.local and bulk.processes(workers) == 1
    if alone and not is_folder and shard_slates is None:
        count = _stream(job, output)
    else:
        count = _run(job, None if is_folder else output, engine, workers)
    typer.echo(json.dumps({"slates": count, "output": str(output)}))


def _base(
    settings: Config, adapter: Adapter, base: str | None, set_: list[str] | None
) -> dict[str, Any]:
    """Returns the arguments of `load_base`: the base asked for, else the adapter's own."""
    from peftrank.store import base_arguments

    wanted = settings.base.model_dump()
    if base is not None or any(text.strip().startswith("base.") for text in set_ or ()):
        return wanted
    return wanted | base_arguments(adapter.manifest)


def _loaded(adapter: Adapter, base: dict[str, Any], domain: str) -> Ranker:
    from peftrank.base import load_base
    from peftrank.ranker import Ranker

    ranker = Ranker(load_base(**base))
    ranker.load_adapter(adapter.source, domain=domain)
    return ranker


def _stream(job: Job, output: Path) -> int:
    """Ranks in this process, straight into a file."""
    from peftrank.formats.slates import read_slates
    from peftrank.serving import bulk

    slates = read_slates(job.input, items=job.items)
    ranker = _loaded(job.adapter, dict(job.base), job.domain)
    return bulk.write_file(output, ranker.rank_stream(slates, domain=job.domain, k=job.k), job)


def _run(job: Job, output: Path | None, engine: Engine, workers: int | None) -> int:
    """Ranks shard by shard, in workers, and shows how far it is."""
    from peftrank.serving import bulk, bulk_ray

    rank = bulk_ray.on_ray if engine is Engine.ray else bulk.local
    if output is None:
        done = bulk.run(job, rank, workers=workers, progress=_progress())
    else:
        done = bulk.run_into_file(job, output, rank, workers=workers, progress=_progress())
    return done.slates


def _progress() -> Callable[[int, int], None]:
    """Returns what reports on standard error: a line that renews itself, or one a minute."""
    terminal = sys.stderr.isatty()
    told = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal told
        if terminal:
            end = "\n" if done == total else "\r"  # what comes next is written over it
            typer.echo(f"{done:,} of {total:,} slates ranked{end}", err=True, nl=False)
        elif time.monotonic() - told >= _REPORT_SECONDS:
            told = time.monotonic()
            typer.echo(f"{done:,} of {total:,} slates ranked", err=True)

    return report


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
