"""The progress of a stage, for whoever watches."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bar(
    title: str, total: int, done: int, fields: Sequence[str], *, shown: bool = True
) -> Iterator["ProgressBar"]:
    """A progress bar with the numbers that matter; a line now and then without a terminal.

    With `shown` False nothing is written: of several ranks one reports.
    """
    console = Console(quiet=not shown)
    with Progress(
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task(title, total=total, completed=done, numbers="")
        yield ProgressBar(bar, task, title, total, fields, console)


class ProgressBar:
    """See `progress_bar`."""

    def __init__(
        self,
        bar: Progress,
        task: Any,
        title: str,
        total: int,
        fields: Sequence[str],
        console: Console,
    ) -> None:
        self._bar, self._task, self._title, self._total = bar, task, title, total
        self._fields, self._console = fields, console

    def update(self, step: int, values: dict[str, Any]) -> None:
        """Show the finished step count and the chosen numbers."""
        shown = [
            f"{key.replace('_', ' ')} {values[key]:.3g}"
            for key in self._fields
            if isinstance(values.get(key), int | float)
        ]
        text = "  ".join(shown)
        self._bar.update(self._task, completed=step, numbers=text)
        if not self._console.is_terminal and (step == self._total or step % 20 == 0):
            self._console.print(
                f"{self._title} {step}/{self._total}  {text}", highlight=False, soft_wrap=True
            )
