r"""Proofs that two formulas are equal, or not, in child processes with hard limits.

sympy can take hours or all memory on one formula, inside C code that neither a signal handler nor
a thread can stop. So the work is done in processes that the kernel ends after 2 CPU seconds
(`symbolic_worker`). CPU time, not wall time, so that a busy machine does not change a reward. What
is sent are trees (`formula`), never text. Threads that ask at the same time are answered by as many
processes, at most one for each core.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from r1v3.cores import cores_of_rank

START_SECONDS = 120.0
REPLY_SECONDS = 60.0
PACKAGE_ROOT = Path(__file__).resolve().parents[2]

Tree = tuple[Any, ...]


class Undecided(Exception):
    """Neither equality nor inequality could be shown within the limits."""


class _Worker:
    """One child process, which answers one question at a time."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def start(self) -> None:
        self.buffer = b""
        paths = [str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "r1v3.rewards.symbolic_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            # torchrun sends SIGTERM to the process group; the step under way is still scored.
            start_new_session=True,
        )
        reply = self.read_line(START_SECONDS)
        if reply != "ready":
            self.stop()
            raise RuntimeError(
                f"the process that runs sympy did not start ({reply or 'no reply'}); "
                "check that sympy is installed and that memory is free"
            )

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def read_line(self, seconds: float) -> str | None:
        """Next line of the child's output; None if it ended or was silent for `seconds`."""
        assert self.process is not None and self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        readable = select.poll()  # select() refuses descriptors above 1023
        readable.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not readable.poll(remaining * 1000):
                return None
            chunk = os.read(descriptor, 4096)
            if not chunk:
                return None
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.decode("utf-8", "replace")

    def ask(self, request: bytes) -> str | None:
        """The child's reply to one line; None if it was ended by a limit."""
        if self.process is None or self.process.poll() is not None:
            self.stop()
            self.start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(request)
            reply = self.read_line(REPLY_SECONDS)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.stop()
        return reply


class _Pool:
    """Child processes, started when all that there are have a question; idle ones are used first.

    Args:
        size: most of them.
    """

    def __init__(self, size: int) -> None:
        self.free = threading.Semaphore(size)
        self.workers: list[_Worker] = []
        self.idle: list[_Worker] = []

    def ask(self, request: bytes) -> str | None:
        """See `_Worker.ask`."""
        with self.free:
            try:
                worker = self.idle.pop()
            except IndexError:
                worker = _Worker()
                self.workers.append(worker)
            try:
                return worker.ask(request)
            finally:
                self.idle.append(worker)

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


_pool = _Pool(cores_of_rank())


def _forget_parents_pool() -> None:
    """After a fork the pipes belong to the parent: two users would read each other's replies."""
    global _pool
    _pool = _Pool(cores_of_rank())


os.register_at_fork(after_in_child=_forget_parents_pool)
atexit.register(lambda: _pool.stop())


@lru_cache(maxsize=65536)
def _asked(question: str, first: Tree, second: Tree) -> bool | None:
    reply = _pool.ask(json.dumps([question, first, second]).encode() + b"\n")
    return {"1": True, "0": False}.get(reply or "")


def _decided(question: str, first: Tree, second: Tree) -> bool:
    answer = _asked(question, first, second)
    if answer is None:
        raise Undecided(question)
    return answer


def proved_equal(first: Tree, second: Tree) -> bool:
    """True if two formulas are shown to be equal, False if shown not to be.

    Raises:
        Undecided: neither was shown within 2 CPU seconds.
        RuntimeError: sympy cannot be run at all (not installed, no memory).
    """
    return _decided("equal", first, second)


def proved_within(tree: Tree, center: Fraction, distance: Fraction) -> bool:
    """Whether the real number `tree` lies within `distance` of `center`; raises as above."""
    return _decided("within", tree, ("within", str(center), str(distance)))


def proved_proportional(first: Tree, second: Tree) -> bool:
    """Whether two formulas differ by a constant factor that is not zero; raises as above."""
    return _decided("proportional", first, second)
