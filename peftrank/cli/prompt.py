"""`peftrank prompt`."""

from __future__ import annotations

from typing import Annotated

import typer

from peftrank.cli import options

app = typer.Typer(help="See what the model reads.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """See what the model reads."""


@app.command()
def show(
    domain: options.Domain = None,
    config: options.ConfigFile = None,
    base: options.Base = None,
    data: options.Data = None,
    index: Annotated[int, typer.Option(help="Which slate of the test part.", min=0)] = 0,
    set_: options.Set = None,
) -> None:
    """Print the prompt tree of one slate with its token counts."""
    from peftrank.base import load_tokenizer
    from peftrank.cli.settings import settings_of, slate_at
    from peftrank.plugins import load
    from peftrank.prompts import PromptTemplate, render

    settings = settings_of(
        domain=domain, config=config, base=base, data=data, set_=set_, check_options=False
    )
    slate = slate_at(settings, "test", index)
    tokenizer, max_depth = load_tokenizer(settings.base.name, revision=settings.base.revision)
    template = PromptTemplate(
        tokenizer,
        **settings.prompt.model_dump(exclude={"template"}),
        parts=settings.prompt.template.model_dump(),
        turn=load("readouts", settings.readout.name).turn,
        max_depth=max_depth,
    )
    typer.echo(render(template, slate))
