"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Domain = Annotated[str | None, typer.Option(help="news, ecommerce, video, social, or your own.")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A YAML file; absent: the domain's shipped one.")
]
Store = Annotated[Path, typer.Option(help="The adapter store.")]
Base = Annotated[
    str | None,
    typer.Option(help="Base model: an alias, a folder, or a Hub id. Overrides the file."),
]
Data = Annotated[
    Path | None,
    typer.Option(help="A folder that `peftrank data prepare` wrote; absent: the embedded sample."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key: --set training.epochs=1"),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
