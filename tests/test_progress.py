"""A running stage as a person sees it, in a terminal and in a log file."""

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

import r1v3.progress
from r1v3.progress import clock, progress_bar


class Time:
    """A clock that tests set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    frozen = Time()
    monkeypatch.setattr(r1v3.progress, "time", frozen)
    return frozen


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The text that bars write, to a log file unless a test says otherwise."""
    file = io.StringIO()
    monkeypatch.setattr(
        r1v3.progress, "Console", lambda quiet: Console(file=file, quiet=quiet, width=120)
    )
    yield file


@pytest.mark.parametrize(
    ("seconds", "shown"), [(-3, "0:00"), (59.6, "1:00"), (754, "12:34"), (3 * 3600 + 62, "3:01:02")]
)
def test_durations_are_read_at_a_glance(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_the_first_step_already_says_how_long_it_will_take(
    time: Time, written: io.StringIO
) -> None:
    """Otherwise one could not decide to stay or to come back later; steps of more than half a
    minute had no estimate at all."""
    with progress_bar("sft", 10, fields=("loss",), every=4) as bar:
        time.now = 90.0
        bar.update(1, {"loss": 1.23456, "other": 3})
    assert written.getvalue() == "sft 1/10  13:30 left  loss 1.23\n"


def test_a_resumed_run_counts_its_own_steps_only(time: Time, written: io.StringIO) -> None:
    """Otherwise the steps before the interruption would look as if they had taken no time."""
    with progress_bar("sft", 10, done=8, every=4) as bar:
        time.now = 5.0
        bar.update(9)
    assert written.getvalue() == "sft 9/10  0:05 left\n"


def test_a_log_file_gets_some_lines_and_not_all(time: Time, written: io.StringIO) -> None:
    """Otherwise a log would be a thousand lines long, or silent for an hour of slow steps."""
    with progress_bar("grpo", 12, every=5) as bar:
        for step in range(1, 13):
            time.now += 40.0 if step == 8 else 25.0 if step == 9 else 1.0
            bar.update(step)
    steps = [line.split()[1] for line in written.getvalue().splitlines()]
    assert steps == ["1/12", "5/12", "9/12", "10/12", "12/12"]


def test_a_terminal_counts_down_between_the_steps(
    time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the bar of a slow step would look frozen."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(r1v3.progress, "Console", lambda quiet: console)
    with progress_bar("eval", 100) as bar:
        assert "-:-- left" in file.getvalue()
        time.now = 10.0
        bar.advance(25)
        time.now = 15.0
    shown = file.getvalue()
    assert "25/100" in shown and "0:25 left" in shown


def test_ranks_that_do_not_report_are_silent(time: Time, written: io.StringIO) -> None:
    """Otherwise every line would appear once per rank."""
    with progress_bar("sft", 2, every=1, shown=False) as bar:
        bar.update(1)
        bar.update(2)
    assert written.getvalue() == ""
