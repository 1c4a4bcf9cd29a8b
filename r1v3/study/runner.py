"""Running the runs of studies as processes of their verbs, in order, several at a time.

A run that is killed goes on where its stage does, the next time. While one is running, its process
holds a lock: what an earlier study left running is waited for, and two studies may share runs.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from r1v3.config import to_yaml
from r1v3.files import write_json, write_text
from r1v3.progress import clock
from r1v3.study.estimate import Clock
from r1v3.study.finished import TRAINING, begun, finished
from r1v3.study.plan import Run
from r1v3.trainer.interrupt import StageInterrupted, StopRequest

_POLL_SECONDS = 0.1
_LINE_SECONDS = 60.0


@dataclass
class _Running:
    """A process, or one that somebody else started (None), which holds the lock of a run."""

    process: subprocess.Popen[bytes] | None
    started: float


class Runner:
    """The runs of one or several studies.

    Args:
        runs: by key; those that a run needs come before it.
        labels: what to call each run.
        out: where locks, logs and configurations lie.
        jobs: most processes at a time.
        say: is given every line of progress.
    """

    def __init__(
        self,
        runs: Mapping[str, Run],
        labels: Mapping[str, list[str]],
        out: Path,
        jobs: int,
        say: Callable[[str], None],
    ) -> None:
        self.runs, self.labels, self.out, self.jobs, self.say = runs, labels, out, jobs, say
        self.waiting = [key for key, run in runs.items() if not finished(run)]
        self.total = len(self.waiting)
        self.running: dict[str, _Running] = {}
        self.failed: dict[str, str] = {}
        self.clock = Clock(runs, jobs)
        self.told = time.monotonic()

    def run(self) -> dict[str, str]:
        """Run what is not finished; return what failed, or could not be run for it, by key.

        Raises:
            StageInterrupted: a signal came; the processes were asked to stop, and have.
        """
        done = len(self.runs) - self.total
        if self.total:
            self.say(
                f"{self.total} runs, {done} are there already; {self.jobs} at a time, "
                f"about {clock(self.clock.left(self.waiting))}"
            )
        with StopRequest() as stop, contextlib.ExitStack() as stack:
            stack.callback(self._kill)
            while self.waiting or self.running:
                self._start_ready()
                self._end_done()
                self._tell_steps()
                if stop.requested:
                    self._stop()
                time.sleep(_POLL_SECONDS)
        return self.failed

    def _start_ready(self) -> None:
        for key in list(self.waiting):
            run = self.runs[key]
            lacking = [need for need in run.needs if need in self.failed]
            if lacking:
                self.waiting.remove(key)
                self.failed[key] = f"needs {lacking[0]}"
                continue
            ready = not any(need in self.waiting or need in self.running for need in run.needs)
            if ready and len(self.running) < self.jobs:
                self.waiting.remove(key)
                self.running[key] = self._started(run)

    def _started(self, run: Run) -> _Running:
        lock = _locked(self.out, run.key)
        if lock is None:
            self.say(f"{run.key}: another process is at it, which is waited for")
            return _Running(None, time.monotonic())
        try:
            write_config(run)
            log = self.out / "logs" / f"{run.key}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "r1v3", *arguments(run)],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    pass_fds=(lock,),
                    # A Ctrl-C of the terminal reaches this process alone, which passes it on.
                    start_new_session=True,
                )
        finally:
            os.close(lock)
        return _Running(process, time.monotonic())

    def _end_done(self) -> None:
        for key, running in list(self.running.items()):
            if running.process is None:
                lock = _locked(self.out, key)
                if lock is None:
                    continue
                os.close(lock)
                code = 0
            elif (code := running.process.poll()) is None:  # type: ignore[assignment]
                continue
            del self.running[key]
            self._ended(key, code, running)

    def _ended(self, key: str, code: int, running: _Running) -> None:
        run, seconds = self.runs[key], time.monotonic() - running.started
        if running.process is None and not finished(run):
            self.waiting.insert(0, key)
            return
        if code == 0 and finished(run):
            _add_seconds(self.out, key, seconds)
            self.clock.ended(key, seconds)
            state = f"done in {clock(seconds)}"
        else:
            self.failed[key] = _reason(self.out / "logs" / f"{key}.log", code)
            state = f"FAILED: {self.failed[key]}"
        left = [*self.waiting, *self.running]
        number = self.total - len(left)
        ends = f"  about {clock(self.clock.left(left))} left" if left else ""
        self.say(f"{number}/{self.total}  {key}  ({self._label(key)})  {state}{ends}")
        self.told = time.monotonic()

    def _label(self, key: str) -> str:
        first, *others = self.labels[key]
        return f"{first} and {len(others)} more" if others else first

    def _tell_steps(self) -> None:
        """Say once in a while how far the running ones are."""
        if time.monotonic() < self.told + _LINE_SECONDS:
            return
        self.told = time.monotonic()
        parts = [f"{key} {_progress(self.runs[key])}".strip() for key in self.running]
        self.say(f"running: {', '.join(parts)}")

    def _stop(self) -> None:
        for running in self.running.values():
            if running.process is not None:
                running.process.terminate()
        for running in self.running.values():
            if running.process is not None:
                running.process.wait()
        raise StageInterrupted("the study stopped; its runs are saved: the same command goes on")

    def _kill(self) -> None:
        for running in self.running.values():
            if running.process is not None and running.process.poll() is None:
                running.process.kill()
                running.process.wait()


def arguments(run: Run) -> list[str]:
    """The words after `r1v3` that start a run, or let it go on."""
    return [run.verb, str(run.file), *(["--resume"] if begun(run) else [])]


def write_config(run: Run) -> None:
    """Write the configuration that a run is started with."""
    write_text(run.file, to_yaml(run.config))


def seconds_of(out: Path, key: str) -> float | None:
    """Return how long a run has taken, or None where no study ran it."""
    try:
        return float(json.loads(_seconds_file(out, key).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def _seconds_file(out: Path, key: str) -> Path:
    return out / "logs" / f"{key}.seconds.json"


def _add_seconds(out: Path, key: str, seconds: float) -> None:
    write_json(_seconds_file(out, key), round((seconds_of(out, key) or 0.0) + seconds, 1))


def _locked(out: Path, key: str) -> int | None:
    """Take the lock of a run; None where another process has it."""
    path = out / "locks" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _reason(log: Path, code: int) -> str:
    """The last error of a run's log, or its last line, or how its process ended."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    if code > 0 and lines:
        ending = errors[-1] if errors else lines[-1]
    return f"{ending}; see {log}"


def _progress(run: Run) -> str:
    """`step n` of a training run, read from its metrics."""
    file = run.folder / "metrics" / f"{run.verb}.jsonl"
    if run.verb not in TRAINING or not file.is_file():
        return ""
    try:
        last = file.read_bytes().splitlines()[-1]
        return f"step {json.loads(last)['step']}"
    except (IndexError, ValueError, KeyError):
        return ""
