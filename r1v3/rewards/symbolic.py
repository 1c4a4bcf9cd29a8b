r"""Symbolic equality of two short LaTeX expressions, with hard limits.

sympy can take hours or all memory on one line of text, inside C code that neither a signal handler
nor a thread can stop. So text is screened first, and what passes is compared in a child process
that the kernel ends after 2 CPU seconds (`symbolic_worker`). CPU time, not wall time, so that a
busy machine does not change a reward. Works from any thread.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

MAX_CHARS = 200
MAX_DEPTH = 8
START_SECONDS = 120.0
REPLY_SECONDS = 60.0

_COMMANDS = frozenset(
    r"""frac dfrac tfrac sqrt pi cdot times div pm mp left right circ infty degree
    leq geq le ge lt gt neq ne in cup cap emptyset varnothing mathbb mathrm text
    sin cos tan cot sec csc arcsin arccos arctan ln log exp lg
    alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega Delta Omega
    begin end quad qquad""".split()
)
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_WORD = re.compile(r"[^\W\d_]{3,}")
_FUNCTION_WORDS = frozenset("sqrt sin cos tan log exp matrix pmatrix bmatrix vmatrix".split())
_POWER = re.compile(r"\^|\*\*")
_SMALL = r"[+-]?(?:\d{1,2}[A-Za-z]?|[A-Za-z])"
_SIMPLE_EXPONENT = re.compile(
    rf"\s*(?:\d(?!\d)|[A-Za-z]|\\circ(?![A-Za-z])|\\prime(?![A-Za-z])|\{{\s*(?:\\circ|{_SMALL}"
    rf"(?:/\d{{1,2}})?|[+-]?\\[dt]?frac\{{{_SMALL}\}}\{{\d{{1,2}}\}})\s*\}}"
    rf"|\({_SMALL}(?:/\d{{1,2}})?\))(?!\s*(?:\^|\*\*))"
)
_POWER_OF_GROUP = re.compile(r"[)\]}]\s*(?:\^|\*\*)\s*[{(]?\s*[+-]?\d\d")
_LONG_NUMBER = re.compile(r"\d{16}")


def is_tame(text: str) -> bool:
    """True if `text` looks like a formula that sympy reads quickly.

    Refused: more than 200 characters, 16-digit numbers, factorials, exponents other than two
    digits (one on a bracket), a letter or a small fraction, towers of powers, brackets deeper than
    8, LaTeX commands outside a short list, and prose (letters alone, or a run of three letters
    that is no function name; sympy would read "rat" and "tar" as the same product).
    """
    if not text or len(text) > MAX_CHARS or "!" in text.replace("\\!", ""):
        return False
    if _LONG_NUMBER.search(text.replace(",", "")) or _POWER_OF_GROUP.search(text):
        return False
    if any(name not in _COMMANDS for name in _COMMAND.findall(text)):
        return False
    if text.isalpha() and len(text) > 1:
        return False
    words = _WORD.findall(_COMMAND.sub(" ", text))
    if any(word not in _FUNCTION_WORDS for word in words):
        return False
    if any(not _SIMPLE_EXPONENT.match(text, power.end()) for power in _POWER.finditer(text)):
        return False
    depth = 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if depth > MAX_DEPTH:
            return False
    return True


class _Worker:
    """One child process and the lock that serializes its use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.buffer = b""

    def start(self) -> None:
        script = Path(__file__).with_name("symbolic_worker.py")
        self.buffer = b""
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # torchrun sends SIGTERM to the process group; the step under way is still scored.
            start_new_session=True,
        )
        reply = self.read_line(START_SECONDS)
        if reply != "ready":
            self.stop()
            raise RuntimeError(
                f"the process that runs math-verify did not start ({reply or 'no reply'}); "
                "check that math-verify is installed and that memory is free"
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

    def ask(self, request: bytes) -> bool:
        with self.lock:
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
            return reply == "1"


_worker = _Worker()


def _forget_parents_worker() -> None:
    """After a fork the pipe belongs to the parent: two users would read each other's replies."""
    global _worker
    _worker = _Worker()


os.register_at_fork(after_in_child=_forget_parents_worker)
atexit.register(lambda: _worker.stop())


@lru_cache(maxsize=65536)
def symbolically_equal(gold: str, answer: str, relative_tolerance: float) -> bool:
    """True if math-verify shows `answer` equal to `gold`; False if not, or not within 2 CPU s.

    Two real numbers also count as equal within `relative_tolerance`, unless gold is an integer.

    Raises:
        RuntimeError: math-verify cannot be run at all (not installed, no memory).
    """
    if not is_tame(gold) or not is_tame(answer):
        return False
    return _worker.ask(json.dumps([gold, answer, relative_tolerance]).encode() + b"\n")
