"""The command line. Each command parses, calls the library, prints; torch loads only if used."""

from __future__ import annotations

import os
import sys

import typer

from peftrank import __version__
from peftrank.cli import adapters, data, evaluate, prompt, rank, train
from peftrank.errors import PeftRankError

app = typer.Typer(
    name="peftrank",
    help="Fine-tune an LLM for listwise recommendation: one base, one small adapter per domain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.command)
app.command("evaluate")(evaluate.command)
app.command("rank")(rank.command)
app.add_typer(data.app, name="data")
app.add_typer(prompt.app, name="prompt")
app.add_typer(adapters.app, name="adapters")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(f"peftrank {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line. Exit code 0: done; 1: stopped or failed; 2: bad input or usage."""
    try:
        app()
    except PeftRankError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep Python from failing once more while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        typer.echo(f"error: {error.filename or 'a file'}: {error.strerror or error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(1)
