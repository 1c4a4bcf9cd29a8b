"""Child process that compares two expressions with math-verify. Run by path, not imported.

Reads one JSON line `[gold, answer, relative_tolerance]` and writes one line "1" or "0". The kernel
ends the process when one comparison has used its CPU seconds, even inside a big-integer power,
where no Python exception could be raised.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

CPU_SECONDS = 2.0
MEMORY_BYTES = 4 << 30


def _parse(text: str) -> list[Any]:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # LaTeX only: the plain extractors pick a stray number out of text they cannot parse. No units:
    # "2ab" would lose its last letters as a unit and equal 2.
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all"
    )
    configs = [LatexExtractionConfig(boxed_match_priority=0, normalization_config=normalization)]
    return parse(f"\\boxed{{{text}}}", configs, parsing_timeout=None)  # type: ignore[arg-type]


def _close(gold: Any, answer: Any, relative_tolerance: float) -> bool:
    """Real numbers within the tolerance; an integer must be met exactly."""
    from sympy import Expr

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return False
    if not (gold.is_number and answer.is_number) or gold.is_Integer:
        return False
    expected, given = complex(gold.evalf()), complex(answer.evalf())
    if expected.imag or given.imag:
        return False
    return abs(expected - given) <= relative_tolerance * abs(expected)


def equivalent(gold: str, answer: str, relative_tolerance: float) -> bool:
    """True if math-verify accepts `answer` for `gold`, or both are close real numbers."""
    from math_verify import verify

    golds, answers = _parse(gold), _parse(answer)
    if not golds or not answers:
        return False
    if verify(golds, answers, timeout_seconds=None):
        return True
    return _close(golds[0], answers[0], relative_tolerance)


def main() -> None:
    """Serve comparisons until standard input closes."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library that prints must not write into the protocol
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    try:
        equivalent("x", "2x", 0.0)
    except ImportError as error:
        replies.write(f"error {error}\n")
        return
    replies.write("ready\n")
    for line in sys.stdin:
        gold, answer, relative_tolerance = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            accepted = equivalent(gold, answer, relative_tolerance)
        except Exception:  # sympy raises nearly anything on odd input; the answer is then not shown
            accepted = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if accepted else "0\n")


if __name__ == "__main__":
    main()
