"""The command line. Each command parses, calls the library, prints; torch loads only if used."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence

import typer

from peftrank import __version__
from peftrank.cli import adapters, data, doctor, evaluate, prompt, rank, serve, train, tune
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
app.command("serve")(serve.command)
app.command("tune")(tune.command)
app.command("doctor")(doctor.command)
app.add_typer(data.app, name="data")
app.add_typer(prompt.app, name="prompt")
app.add_typer(adapters.app, name="adapters")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        typer.echo(f"peftrank {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits. 0: done; 1: stopped; 2: not done, and the message says why.

    Args:
        arguments: Absent: those of the process.
    """
    _quiet()
    try:
        app(arguments)
    except PeftRankError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (`| head`) has gone; keep Python from failing once more while flushing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        # Of writing results: input is read with errors that name the line.
        where = error.filename or "a file"
        typer.echo(
            f"error: cannot write {where}: {error.strerror or error}. What was there is unchanged; "
            "free some space or choose another place.",
            err=True,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(1)


def _quiet() -> None:
    # Names that transformers deprecates, used by PEFT and here; a user can do nothing about it.
    warnings.filterwarnings(
        "ignore", r"`\w*gradient_checkpointing\w*` is deprecated", category=FutureWarning
    )
