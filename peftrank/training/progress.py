"""The progress bar of a training run: steps done, time left, loss, validation nDCG@10."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Writes to standard error; on something that is not a terminal, a line per evaluation."""

    def __init__(self, total_steps: int, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._console = console
        self._shown = shown
        self._valid = ""
        self._total = total_steps
        self._bar = RichProgress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._bar.add_task("training", total=total_steps, values="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Shows that `step` steps are done, with the newest values."""
        evaluated = [f"{k} {v:.4f}" for k, v in values.items() if k.startswith("valid_")]
        self._valid = evaluated[0] if evaluated else self._valid
        shown = f"loss {values['loss']:.4f} {self._valid}"
        self._bar.update(self._task, completed=step, values=shown)
        if self._shown and not self._console.is_terminal and evaluated:
            remaining = self._bar.tasks[0].time_remaining
            left = "" if remaining is None else f", about {remaining:.0f} s left"
            self._console.print(f"step {step}/{self._total}: {shown}{left}", highlight=False)
