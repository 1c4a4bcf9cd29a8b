"""The progress of anything that takes longer than a moment, for whoever watches."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

_SECONDS_PER_LINE = 60.0


def clock(seconds: float) -> str:
    """A duration as `m:ss`, or `h:mm:ss` from an hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def say(line: str, *, shown: bool = True) -> None:
    """Print a line as it is, without wrapping or colors; `shown`: see `progress_bar`."""
    if shown:
        Console().print(line, highlight=False, soft_wrap=True, markup=False)


class _TimeLeft(ProgressColumn):
    """Counts down to the end that the last update foresaw."""

    def render(self, task: Task) -> Text:
        ends = task.fields["ends"]
        left = "-:--" if ends is None else clock(ends - time.monotonic())
        return Text(f"{left} left", style="progress.remaining")


@contextmanager
def progress_bar(
    title: str,
    total: int,
    *,
    done: int = 0,
    fields: Sequence[str] = (),
    every: int | None = None,
    shown: bool = True,
) -> Iterator["ProgressBar"]:
    """A progress bar with the time left, from the first update on, and the numbers that matter.

    Without a terminal it writes a line at the first update, once a minute, and as `every` says.

    Args:
        title: what is done.
        total: steps that there are.
        done: steps that were done before.
        fields: which of the values given to `update` are shown.
        every: without a terminal, also write a line after so many steps each, and after the last.
        shown: False writes nothing: of several ranks one reports.
    """
    console = Console(quiet=not shown)
    with Progress(
        TextColumn("[bold]{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        _TimeLeft(),
        TextColumn("{task.fields[numbers]}"),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        bar.add_task(title, total=total, completed=done, numbers="", ends=None)
        yield ProgressBar(bar, title, total, done, fields, every)


class ProgressBar:
    """See `progress_bar`."""

    def __init__(
        self,
        bar: Progress,
        title: str,
        total: int,
        done: int,
        fields: Sequence[str],
        every: int | None,
    ) -> None:
        self._bar, self._title, self._total = bar, title, total
        self._fields, self._every = fields, every
        self._done = self._step = done
        self._started, self._written = time.monotonic(), float("-inf")

    def advance(self, steps: int) -> None:
        """Show so many more finished steps."""
        self.update(self._step + steps)

    def update(self, step: int, values: Mapping[str, Any] | None = None) -> None:
        """Show the finished step count and the chosen numbers.

        What is left is taken to cost as much, step by step, as what was done since the bar opened.
        """
        if step <= self._step:
            return
        now, before, self._step = time.monotonic(), self._step, step
        left = (self._total - step) * (now - self._started) / (step - self._done)
        given = {} if values is None else values
        numbers = "  ".join(
            f"{key.replace('_', ' ')} {given[key]:.3g}"
            for key in self._fields
            if isinstance(given.get(key), int | float)
        )
        self._bar.update(self._bar.task_ids[0], completed=step, numbers=numbers, ends=now + left)
        due = self._every and (step // self._every > before // self._every or step == self._total)
        if not self._bar.console.is_terminal and (due or now >= self._written + _SECONDS_PER_LINE):
            self._written = now
            parts = (f"{self._title} {step}/{self._total}", f"{clock(left)} left", numbers)
            self._bar.console.print(
                "  ".join(part for part in parts if part), highlight=False, soft_wrap=True
            )
