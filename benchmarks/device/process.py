"""A command under a time limit, with everything that it starts, and its output in a log."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.2
GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Ended:
    """The end of a command: its status, None past the limit; seconds; last line of its output."""

    status: int | None
    seconds: float
    last_line: str


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    log: Path,
    limit: float,
    meanwhile: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a command, its output appended to the log, and end it at the limit.

    Args:
        environment: what is set beside the caller's own.
        meanwhile: called several times a second.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("ab") as output:
        begin = output.tell()
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        except OSError as error:
            return Ended(127, 0.0, f"{command[0]}: {error.strerror}")
        status: int | None = None
        try:
            while time.monotonic() - start < limit:
                try:
                    status = process.wait(POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    meanwhile()
        finally:
            end_group(process)
    meanwhile()
    return Ended(status, time.monotonic() - start, _last_line(log, begin))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its group, and the group: politely first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:  # nothing of the group is left
            break
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_line(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]
