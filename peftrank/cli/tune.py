"""`peftrank tune`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftrank.cli import options

if TYPE_CHECKING:
    from peftrank.tune import Trial, Tuning


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
    space: Annotated[
        Path | None,
        typer.Option(help="YAML: what to try, by dotted key. Absent: rates and adapter sizes."),
    ] = None,
    trials: Annotated[int, typer.Option(help="Of the whole study.", min=1)] = 20,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds after which no new trial starts.", min=0)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the study. Absent: tuning/<domain>-<method>."),
    ] = None,
    storage: Annotated[
        Path | None, typer.Option(help="The study's SQLite file. Absent: study.db in the folder.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the importance of each key: a .png, .svg or .pdf.")
    ] = None,
    as_json: options.JsonFlag = False,
) -> None:
    """Search for better settings by short trainings; killed, the same command goes on."""
    from peftrank.cli.settings import settings_of
    from peftrank.tune import plot_importance, read_space, tune

    settings = settings_of(
        domain=domain, method=method, config=config, base=base, data=data, set_=set_
    )
    started = time.monotonic()

    def show(trial: Trial) -> None:
        value = "diverged" if trial.value is None else f"nDCG@10 {trial.value:.4f}"
        typer.echo(
            f"trial {trial.number} {trial.state}: {value}, {trial.seconds:.0f} s "
            f"({time.monotonic() - started:.0f} s in all)",
            err=True,
        )

    found = tune(
        settings,
        output=output or Path("tuning") / f"{settings.domain}-{settings.method.name}",
        space=None if space is None else read_space(space),
        trials=trials,
        storage=storage,
        timeout=timeout,
        on_trial=show,
    )
    if plot is not None:
        plot_importance(found, plot)
    if as_json:
        shown = {
            "value": found.value,
            "best": str(found.best_path),
            "importance": found.importance,
            "trials": [asdict(trial) for trial in found.trials],
        }
        typer.echo(json.dumps(shown))
        return
    _tables(found)


def _tables(found: Tuning) -> None:
    from rich.console import Console
    from rich.table import Table

    keys = list(dict.fromkeys(key for trial in found.trials for key in trial.values))
    table = Table("trial", "state", "nDCG@10", *keys)
    for trial in sorted(found.trials, key=lambda trial: -(trial.value or 0.0)):
        value = "" if trial.value is None else f"{trial.value:.4f}"
        tried = [_short(trial.values.get(key, "")) for key in keys]
        table.add_row(str(trial.number), trial.state, value, *tried)
    console = Console()
    console.print(table)
    if found.importance:
        table = Table("key", "importance")
        for key, share in found.importance.items():
            table.add_row(key, f"{share:.2f}")
        console.print(table)
    typer.echo(
        f"best validation nDCG@10 {found.value:.4f}. Train with it: "
        f"peftrank train --config {found.best_path}"
    )


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
