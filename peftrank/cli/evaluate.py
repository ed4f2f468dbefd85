"""`peftrank evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from peftrank.cli import options


def command(
    domain: options.Domain = None,
    adapter: Annotated[
        str | None,
        typer.Option(help="A folder, domain or domain@version; `none`: baselines alone."),
    ] = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    store: options.Store = Path("adapters"),
    part: Annotated[Literal["train", "valid", "test"], typer.Option(help="Its slates.")] = "test",
    limit: Annotated[int | None, typer.Option(help="Only the first so many slates.", min=1)] = None,
    metrics: Annotated[str | None, typer.Option(help="ndcg@10,mrr,hit@1,auc,...")] = None,
    baselines: Annotated[
        str | None, typer.Option(help="random,popularity,bm25,zero_shot,... or `none`.")
    ] = None,
    skip_layers: Annotated[
        int, typer.Option(help="Leave the adapter out of the base's first so many layers.", min=0)
    ] = 0,
    set_: options.Set = None,
    report: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write JSON.")] = None,
) -> None:
    """Measure a domain's adapter beside baselines and the untrained base."""
    from rich.console import Console

    from peftrank import evaluation
    from peftrank.cli.settings import find_adapter, ranker_for, settings_of, slates_of
    from peftrank.evaluation import report as reports
    from peftrank.files import write_bytes
    from peftrank.training.data import read_part
    from peftrank.training.run import prompt_arguments

    settings = settings_of(
        domain=domain, config=config, base=base, data=data, set_=set_, store=store
    )
    folder = None if adapter == "none" else find_adapter(adapter, settings, store)
    slates = slates_of(settings, part)[:limit]
    train = read_part(settings.data, settings.domain, "train")
    measured = metrics.split(",") if metrics else settings.evaluation.metrics
    wanted = settings.evaluation.baselines
    if baselines is not None:
        wanted = () if baselines == "none" else tuple(baselines.split(","))
    ranker = None
    if folder is not None or evaluation.ZERO_SHOT in wanted:
        ranker = ranker_for(settings, store, adapter=folder, base=base, set_=set_)
    rows = evaluation.baseline_rows(
        wanted,
        slates,
        train=train,
        base=None if ranker is None else ranker.base,
        prompt=prompt_arguments(settings),
        metrics=measured,
        seed=settings.seed,
    )
    if ranker is not None and folder is not None:
        name = ranker.load_adapter(folder, domain=settings.domain, skip_layers=skip_layers)
        rows.append(
            evaluation.evaluate(ranker, slates, domain=name, metrics=measured, name="adapter")
        )
    cold = evaluation.cold_slates(slates, train)
    parts = [reports.as_json(f"{settings.domain} {part}", rows)]
    if 0 < len(cold) < len(slates):
        parts.append(reports.as_json("cold items only", [row.only(cold) for row in rows]))
    console = Console()
    for group in parts:
        console.print(reports.as_table(group))
    if report is not None:
        write_bytes(report, reports.as_html(f"{settings.domain}: accuracy", parts).encode())
    if json_file is not None:
        write_bytes(json_file, json.dumps(parts, indent=2).encode())
