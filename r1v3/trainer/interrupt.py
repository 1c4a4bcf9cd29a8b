"""Stopping a run politely: Ctrl-C and SIGTERM end it after the current step."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StageInterrupted(Exception):
    """A stage stopped on request after saving; the message says how to go on."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a flag, and the second into KeyboardInterrupt.

        with StopRequest() as stop:
            for step in steps:
                ...
                if stop.requested:
                    save, say how to resume, return

    The earlier handlers come back on exit. A signal that the process ignores (a background job of
    a shell ignores SIGINT) stays ignored. Off the main thread, where Python installs no handlers,
    this does nothing and `requested` stays False.
    """

    def __init__(self) -> None:
        self._requested = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come since the block was entered."""
        return self._requested

    def __enter__(self) -> Self:
        self._requested = False
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                # None: a handler that was not installed from Python and could not be put back.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one, whose lock is not re-entrant.
        message = f"\n{name}: stopping after this step (once more: stop at once)\n"
        try:
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, message.encode())
        except (OSError, ValueError):
            pass
